//! LISTEN and NOTIFY: what a caller listens to, and what it is told.
//!
//! A listener has no session and no connection of its own. Invariants: what it is not told of since `Listening` lies
//! where it is told `Missed`; `Debug` shows a payload's size, never the payload.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::account::{Resource, Taken};
use super::engine::{Notifications, check_name};
use super::error::Error;
use super::principal::Principal;
use super::terms::Offers;
use super::{BeginSession, Broker};

/// The most channels of one listener: one for each kind of news that a program follows, and room to grow. What is about
/// one of a million things says so in its payload.
const CHANNELS_MAX: usize = 64;

/// A channel's name that PostgreSQL keeps as it is: 1 to 63 bytes without NUL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelName(Arc<str>);

impl ChannelName {
    /// # Errors
    /// [`Error::Invalid`] for that field.
    pub fn new(field: &str, name: &str) -> Result<Self, Error> {
        check_name(field, name)?;
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// So that a channel is found by the name in a notification. The hash and the order are those of the text.
impl Borrow<str> for ChannelName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What NOTIFY sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Notification {
    /// The channel.
    pub channel: String,
    /// May be empty.
    pub payload: String,
    /// The process id of the backend that sent it.
    pub backend_pid: i32,
}

impl fmt::Debug for Notification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { channel, payload, backend_pid } = self;
        write!(f, "{channel:?}[{} B] from {backend_pid}", payload.len())
    }
}

/// What a listener is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenEvent {
    /// What is notified from now on will come.
    Listening,
    /// Somebody notified. All who listen share it.
    Notification(Arc<Notification>),
    /// Some notifications may have been missed; those from now on will come.
    Missed,
}

/// What a caller wants to listen to.
#[derive(Debug)]
pub struct Listen {
    /// Empty: the default engine, or the profile's first.
    pub engine: String,
    /// Empty: the caller's own.
    pub profile: String,
    /// The channels' names, as they are.
    pub channels: Vec<String>,
}

/// A caller that listens. Dropped, it listens no more.
pub struct Listener {
    principal: Principal,
    /// Who may do what.
    offers: watch::Receiver<Arc<Offers>>,
    /// Its place among its principal's.
    _taken: Taken,
    notifications: Box<dyn Notifications>,
    /// Cancelled when the broker stops.
    stopping: CancellationToken,
}

impl Broker {
    /// Listens. Returns when PostgreSQL does; the first event says so too.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Exhausted`] at the engine's maximum of listeners, [`Error::Draining`], and what
    /// keeps PostgreSQL from listening.
    ///
    /// # Cancel safety
    /// Dropping the future leaves no listener behind.
    pub async fn listen(&self, principal: &Principal, request: Listen) -> Result<Listener, Error> {
        let Listen { engine, profile, channels } = request;
        let begin = BeginSession { engine, profile, ..BeginSession::default() };
        let (_, engine) = self.offered(principal, &begin)?;
        let channels = check(&channels)?;
        let mut offers = self.shared.offers.subscribe();
        let max = offers.borrow_and_update().grant(principal)?.quotas.listeners_max;
        let taken = self.shared.accounts.of(principal).take(Resource::Listener, max)?;
        let stopping = self.shared.stopping.clone();
        let notifications = tokio::select! {
            biased;
            () = stopping.cancelled() => return Err(Error::Draining),
            listening = engine.listen(channels) => listening.map_err(|error| error.into_error(engine.name()))?,
        };
        Ok(Listener { principal: principal.clone(), offers, _taken: taken, notifications, stopping })
    }
}

impl Listener {
    /// Waits for the next event.
    ///
    /// # Errors
    /// [`Error::Draining`] once the broker stops, [`Error::Forbidden`] once the principal may do nothing any more: nothing
    /// follows.
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    pub async fn next(&mut self) -> Result<ListenEvent, Error> {
        loop {
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return Err(Error::Draining),
                Ok(()) = self.offers.changed() => {
                    self.offers.borrow_and_update().grant(&self.principal)?;
                }
                event = self.notifications.next() => return Ok(event),
            }
        }
    }
}

/// The channels of those names, each once.
fn check(names: &[String]) -> Result<BTreeSet<ChannelName>, Error> {
    match names.len() {
        0 => Err(Error::invalid("channels", "are none: give at least one")),
        1..=CHANNELS_MAX => {
            let names = names.iter().enumerate();
            names.map(|(index, name)| ChannelName::new(&format!("channels[{index}]"), name)).collect()
        }
        count => Err(Error::invalid("channels", format!("are {count}, the limit is {CHANNELS_MAX}"))),
    }
}
