//! What can be called: the methods of all services, by their paths, and the names of what they answer.
//!
//! Invariant: a path that is none is told to nobody who counts, so that callers make no names.

use std::collections::HashMap;
use std::sync::LazyLock;

use http::HeaderMap;
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::Code;

use super::DESCRIPTORS;

/// What is called that is not there.
const OTHER: &str = "_OTHER";

static METHODS: LazyLock<HashMap<String, &'static str>> = LazyLock::new(|| {
    let own = FileDescriptorSet::decode(DESCRIPTORS).expect("the build has made it");
    let health = FileDescriptorSet::decode(tonic_health::pb::FILE_DESCRIPTOR_SET).expect("its build has made it");
    let mut methods = HashMap::new();
    for file in own.file.into_iter().chain(health.file) {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                methods.insert(format!("/{name}"), &*name.leak());
            }
        }
    }
    for version in ["v1", "v1alpha"] {
        let name = format!("grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        methods.insert(format!("/{name}"), &*name.leak());
    }
    methods
});

/// The method behind a path.
pub(super) fn of_path(path: &str) -> &'static str {
    METHODS.get(path).copied().unwrap_or(OTHER)
}

/// The status that headers or trailers tell, if they do.
pub(super) fn status_of(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// A status's name.
pub(super) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Whether it says that something is wrong here, and not with the call.
pub(super) fn is_failure(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_names_and_other_paths_have_one() {
        for method in [
            "sessionbroker.v1.SessionService/Execute",
            "grpc.health.v1.Health/Watch",
            "sessionbroker.v1.AdminService/Drain",
        ] {
            assert_eq!(of_path(&format!("/{method}")), method);
        }
        for none in ["/", "", "/sessionbroker.v1.SessionService/Steal", "sessionbroker.v1.SessionService/Execute"] {
            assert_eq!(of_path(none), OTHER);
        }
    }
}
