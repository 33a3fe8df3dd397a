//! Who may look at sessions and end them: operators, as with `AdminService`, and nobody's page but ours.
//!
//! Knows no session. A credential is a header that our own page's script sets, and a browser adds none to what other
//! sites ask for, so whoever shows one means it. Where the anonymous principal is an operator nothing is shown, and then
//! a browser is believed only when it says that the page is ours: the request comes from the same site, and goes to
//! `localhost` or an IP address. A page that an attacker's name leads here, by DNS rebinding, has that name as its host.
//! Invariant: each request leaves one line in the audit log, or is counted in one when it shows nothing.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

use http::StatusCode;
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use tokio::time::Instant;
use tracing::field::display;
use tracing::info;

use super::{Problem, Site};
use crate::acceptor::Peer;
use crate::broker::admin::{AUDIT, AdminCall, Operator};
use crate::broker::principal::Principal;
use crate::identity::authorization;

/// By which a browser tells which page sends a request: this site's or another's (W3C, Fetch Metadata).
const SEC_FETCH_SITE: &str = "sec-fetch-site";

impl Site {
    /// Lets an operator make a call.
    pub(super) async fn operator(&self, parts: &Parts, call: AdminCall) -> Result<Operator<'_>, Problem> {
        let refused = |reason: &str, status, error: &str| {
            self.note_refusal(parts, call, reason);
            Problem::new(status, error)
        };
        let principal = self.principal(parts).await;
        let principal = principal.map_err(|Stranger { reason, status, error }| refused(reason, status, &error))?;
        if principal == Principal::anonymous() {
            if !self.broker.is_admin(&principal) {
                let error = "credentials are missing: send authorization: Bearer TOKEN, of a principal that is granted \
                             admin";
                return Err(refused("FORBIDDEN", StatusCode::UNAUTHORIZED, error));
            }
            check_own_page(parts).map_err(|error| refused("FOREIGN_PAGE", StatusCode::FORBIDDEN, error))?;
        }
        let operator = self.broker.operator(principal, call);
        operator.map_err(|error| Problem::new(StatusCode::FORBIDDEN, error.to_string()))
    }

    /// Who asks. Client certificates are for the port of calls.
    async fn principal(&self, parts: &Parts) -> Result<Principal, Stranger> {
        let authenticator = self.authenticator.get();
        let authenticated = async { authenticator.authenticate(None, authorization(&parts.headers)?).await };
        authenticated.await.map_err(|why| {
            let (reason, status) = if why.is_temporary() {
                ("IDENTITY_UNAVAILABLE", StatusCode::SERVICE_UNAVAILABLE)
            } else {
                ("UNAUTHENTICATED", StatusCode::UNAUTHORIZED)
            };
            Stranger { reason, status, error: why.to_string() }
        })
    }

    /// Notes a refusal that anybody can cause.
    fn note_refusal(&self, parts: &Parts, call: AdminCall, reason: &str) {
        let times = self.strangers.lock().unwrap_or_else(PoisonError::into_inner).count(Instant::now());
        let Some(times) = times else { return };
        let address = parts.extensions.get::<Arc<Peer>>().and_then(|peer| peer.address()).map(display);
        info!(target: AUDIT, rpc = %call, address, allowed = false, reason, times, "operator's call");
    }
}

/// Somebody who is nobody, and why.
struct Stranger {
    /// As the audit log has it.
    reason: &'static str,
    status: StatusCode,
    error: String,
}

/// Says what is wrong with a request that shows nothing, should a browser have been made to send it.
fn check_own_page(parts: &Parts) -> Result<(), &'static str> {
    let host = parts.uri.authority().map(Authority::as_str);
    let host = host.or_else(|| parts.headers.get(HOST)?.to_str().ok()).unwrap_or_default();
    if !is_no_name(host) {
        return Err("host is a name: who shows no token asks at localhost or an IP address");
    }
    let all = |name: &str, fits: &dyn Fn(&str) -> bool| {
        parts.headers.get_all(name).iter().all(|value| value.to_str().is_ok_and(fits))
    };
    let from_here = all(SEC_FETCH_SITE, &|site| matches!(site, "same-origin" | "none"))
        && all(ORIGIN.as_str(), &|origin| {
            origin.split_once("://").is_some_and(|(_, own)| own.eq_ignore_ascii_case(host))
        });
    if from_here { Ok(()) } else { Err("the request comes from another site's page: open /console itself") }
}

/// Whether no name leads to a host, so that nobody's name can: its port is left out.
fn is_no_name(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let host = authority.host();
    host == "localhost" || host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    #[test]
    fn only_localhost_and_addresses_are_no_names() {
        for host in ["localhost", "localhost:8081", "127.0.0.1:8081", "[::1]:8081", "[fd00::1]", "10.1.2.3"] {
            assert!(is_no_name(host), "{host}");
        }
        for host in
            ["", "evil.example:8081", "localhost.evil.example", "127.0.0.1.evil.example", "broker", "[::1", "a b"]
        {
            assert!(!is_no_name(host), "{host}");
        }
    }

    #[test]
    fn who_shows_nothing_is_believed_from_our_own_page_alone() {
        let check = |headers: &[(&str, &str)]| {
            let mut request = Request::get("/console/events");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            check_own_page(&request.body(()).unwrap().into_parts().0)
        };
        let host = ("host", "127.0.0.1:8081");
        for headers in [
            &[host][..],
            &[host, ("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8081")],
            &[host, ("sec-fetch-site", "none")],
            &[("host", "localhost:8081"), ("origin", "http://LOCALHOST:8081")],
        ] {
            assert_eq!(check(headers), Ok(()), "{headers:?}");
        }
        for headers in [
            &[][..],
            &[("host", "evil.example:8081"), ("sec-fetch-site", "same-origin")],
            &[host, ("sec-fetch-site", "cross-site")],
            &[host, ("sec-fetch-site", "same-site")],
            &[host, ("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
            &[host, ("origin", "http://evil.example")],
            &[host, ("origin", "http://127.0.0.1:9999")],
            &[host, ("origin", "null")],
        ] {
            assert!(check(headers).is_err(), "{headers:?}");
        }
    }
}
