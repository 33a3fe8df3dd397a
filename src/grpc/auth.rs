//! Who calls.

use tonic::{Request, Status};

use super::status;
use crate::broker::error::Error;
use crate::broker::principal::Principal;

/// The caller's principal, which the gate has put there.
///
/// # Errors
/// UNAUTHENTICATED when the call did not come through the gate.
pub(super) fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    let principal = request.extensions().get::<Principal>().cloned();
    principal.ok_or_else(|| status::from_error(Error::Unauthenticated("the caller is unknown".into())))
}
