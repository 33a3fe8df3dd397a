//! Who calls.

use tonic::metadata::MetadataMap;

use crate::broker::principal::Principal;

/// The caller's principal. For now every caller is the anonymous one.
pub fn principal(_metadata: &MetadataMap) -> Principal {
    Principal::anonymous()
}
