//! LISTEN and NOTIFY: all listeners of an engine share one connection apart from the pool.
//!
//! A task keeps the connection, and PostgreSQL listening on it to what the listeners want. The connection's own task
//! puts what is notified into their inboxes and waits for none of them. Invariants: what a listener is not told of since
//! `Listening` lies where it is told `Missed`; nobody is told anything twice.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_postgres::error::Severity;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::begin::quoted_identifier;
use super::error::pg_error;
use super::opener::{Backend, Notified};
use super::pool::{PAUSE_MAX, PAUSE_MIN, Pool};
use crate::broker::engine::{CheckoutError, Lost, Notifications};
use crate::broker::error::PgError;
use crate::broker::notification::{ChannelName, ListenEvent, Notification};
use crate::random::jittered;

/// The most listeners of an engine. Each may have an inbox full of what it does not read, 250 MiB together, and each
/// adds to the work of every notification on its channels. Who has more of them listens once and hands on.
const LISTENERS_MAX: usize = 1000;

/// How long the connection is kept when nobody listens any more: a caller that comes back finds it.
const UNUSED: Duration = Duration::from_secs(30);

/// How long nothing is asked of the server before it is asked whether it is there. One that has vanished is noticed
/// within this and the time to answer; a connection that only listens sends nothing of its own accord.
const SILENCE: Duration = Duration::from_secs(30);

/// As many channels as one message names, of some kilobytes then.
const CHANNELS_AT_ONCE: usize = 256;

/// An engine's listeners, and the task that keeps their connection.
pub(super) struct Listeners {
    audience: Arc<Audience>,
    patience: Duration,
    _task: AbortOnDropHandle<()>,
}

impl Listeners {
    /// Those of an engine of that name. Call it on a tokio runtime.
    pub(super) fn new(engine: String, pool: Arc<Pool>) -> Self {
        let audience = Arc::<Audience>::default();
        // A connection that turns out to be gone, a pause, another one, and LISTEN on it.
        let patience = PAUSE_MAX + 3 * pool.connect_options().connect_timeout;
        let task = tokio::spawn(keep(engine, audience.clone(), pool));
        Self { audience, patience, _task: AbortOnDropHandle::new(task) }
    }

    /// Listens. Returns when PostgreSQL has confirmed it.
    ///
    /// # Cancel safety
    /// Dropping the future leaves no listener behind.
    pub(super) async fn listen(
        &self,
        channels: BTreeSet<ChannelName>,
    ) -> Result<Box<dyn Notifications>, CheckoutError> {
        let (ear, answer) = self.audience.enter(channels)?;
        match timeout(self.patience, answer).await {
            Ok(Ok(Ok(()))) => Ok(Box::new(ear)),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(CheckoutError::Unreachable("the engine is gone".into())),
            Err(_) => {
                let patience = humantime::format_duration(self.patience);
                Err(CheckoutError::Unreachable(format!("the server did not listen within {patience}")))
            }
        }
    }
}

/// Whether one that waits listens now, or why it does not.
type Answer = Result<(), CheckoutError>;

/// Who listens to what.
#[derive(Default)]
struct Audience {
    state: Mutex<State>,
    /// Notified when somebody comes or goes. The task that keeps the connection waits.
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// By their numbers.
    listeners: BTreeMap<u64, Listener>,
    /// The last number given to one.
    numbered: u64,
    /// The inboxes of those that listen, by what they listen to.
    inboxes: HashMap<ChannelName, BTreeMap<u64, Arc<Inbox>>>,
    /// The connection whose notifications are passed on. None between the loss of one and the moment when the next has
    /// all channels: what comes in between is missed, so that nothing is told by both.
    line: Option<u64>,
}

struct Listener {
    channels: BTreeSet<ChannelName>,
    inbox: Arc<Inbox>,
    standing: Standing,
}

enum Standing {
    /// PostgreSQL has not yet confirmed all of its channels.
    Waiting(oneshot::Sender<Answer>),
    /// It is told what is notified.
    Listening,
}

impl Audience {
    /// Takes a listener in, which waits until it is answered.
    fn enter(
        self: &Arc<Self>,
        channels: BTreeSet<ChannelName>,
    ) -> Result<(Ear, oneshot::Receiver<Answer>), CheckoutError> {
        let (told, answer) = oneshot::channel();
        let inbox = Arc::<Inbox>::default();
        let mut state = self.lock();
        if state.listeners.len() >= LISTENERS_MAX {
            return Err(CheckoutError::Listeners(LISTENERS_MAX));
        }
        state.numbered += 1;
        let number = state.numbered;
        let listener = Listener { channels, inbox: inbox.clone(), standing: Standing::Waiting(told) };
        state.listeners.insert(number, listener);
        drop(state);
        self.changed.notify_one();
        Ok((Ear { audience: self.clone(), number, inbox }, answer))
    }

    fn leave(&self, number: u64) {
        self.lock().remove(number);
        self.changed.notify_one();
    }

    /// Waits until somebody wants to listen.
    async fn until_wanted(&self) {
        while self.lock().listeners.is_empty() {
            self.changed.notified().await;
        }
    }

    /// Tells those that wait why they do not listen.
    fn refuse(&self, error: &CheckoutError) {
        let mut state = self.lock();
        let waiting: Vec<_> = state.waiting().map(|(number, _)| number).collect();
        for number in waiting {
            state.refuse(number, error.clone());
        }
    }

    /// Passes on what a connection was notified of.
    fn hear(&self, line: u64, notification: &tokio_postgres::Notification) {
        let state = self.lock();
        if state.line != Some(line) {
            return;
        }
        let Some(inboxes) = state.inboxes.get(notification.channel()) else { return };
        let notification = Arc::new(Notification {
            channel: notification.channel().to_owned(),
            payload: notification.payload().to_owned(),
            backend_pid: notification.process_id(),
        });
        for inbox in inboxes.values() {
            inbox.put(&notification);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Those that wait, with their numbers.
    fn waiting(&self) -> impl Iterator<Item = (u64, &Listener)> {
        let listeners = self.listeners.iter().map(|(number, listener)| (*number, listener));
        listeners.filter(|(_, listener)| matches!(listener.standing, Standing::Waiting(_)))
    }

    /// One that waited listens from now on.
    fn admit(&mut self, number: u64) {
        // It may have left meanwhile.
        let Some(listener) = self.listeners.get_mut(&number) else { return };
        if let Standing::Waiting(told) = std::mem::replace(&mut listener.standing, Standing::Listening) {
            listener.inbox.begin();
            for channel in &listener.channels {
                self.inboxes.entry(channel.clone()).or_default().insert(number, listener.inbox.clone());
            }
            // Who waits no more is about to leave.
            let _ = told.send(Ok(()));
        }
    }

    /// One that waited does not listen.
    fn refuse(&mut self, number: u64, error: CheckoutError) {
        if let Some(Listener { standing: Standing::Waiting(told), .. }) = self.remove(number) {
            let _ = told.send(Err(error));
        }
    }

    fn remove(&mut self, number: u64) -> Option<Listener> {
        let listener = self.listeners.remove(&number)?;
        for channel in &listener.channels {
            if let Some(inboxes) = self.inboxes.get_mut(channel) {
                inboxes.remove(&number);
                if inboxes.is_empty() {
                    self.inboxes.remove(channel);
                }
            }
        }
        Some(listener)
    }

    /// A new connection has all channels of those that listen, who may have missed something since the last.
    fn resume(&mut self, line: u64) {
        self.line = Some(line);
        for listener in self.listeners.values() {
            match listener.standing {
                Standing::Waiting(_) => {}
                Standing::Listening => listener.inbox.miss(),
            }
        }
    }
}

/// What a listener has yet to be told.
#[derive(Default)]
struct Inbox {
    untold: Mutex<Untold>,
    /// Notified when something comes. The listener waits.
    came: Notify,
}

#[derive(Default)]
struct Untold {
    events: VecDeque<ListenEvent>,
    /// What the notifications among them take.
    bytes: usize,
}

impl Inbox {
    /// Two thousand short notifications or thirty of the longest, of eight kilobytes: a burst that a caller reads in no
    /// time, and not what one leaves behind that does not read at all.
    const BYTES_MAX: usize = 256 * 1024;

    /// The first event.
    fn begin(&self) {
        lock(&self.untold).events.push_back(ListenEvent::Listening);
        self.came.notify_one();
    }

    /// A notification where there is room for it; where there is none, it is missed.
    fn put(&self, notification: &Arc<Notification>) {
        let size = size(notification);
        let mut untold = lock(&self.untold);
        if untold.bytes + size > Self::BYTES_MAX {
            drop(untold);
            return self.miss();
        }
        untold.bytes += size;
        untold.events.push_back(ListenEvent::Notification(notification.clone()));
        drop(untold);
        self.came.notify_one();
    }

    /// Something is missed between what is here and what comes next. There is always room to say so: it is said once.
    fn miss(&self) {
        let mut untold = lock(&self.untold);
        if untold.events.back() != Some(&ListenEvent::Missed) {
            untold.events.push_back(ListenEvent::Missed);
        }
        drop(untold);
        self.came.notify_one();
    }

    fn take(&self) -> Option<ListenEvent> {
        let mut untold = lock(&self.untold);
        let event = untold.events.pop_front()?;
        if let ListenEvent::Notification(notification) = &event {
            untold.bytes -= size(notification);
        }
        Some(event)
    }
}

/// What a notification takes in memory, which those share that it is for.
fn size(notification: &Notification) -> usize {
    size_of::<Notification>() + notification.channel.len() + notification.payload.len()
}

/// A listener's side.
struct Ear {
    audience: Arc<Audience>,
    number: u64,
    inbox: Arc<Inbox>,
}

#[async_trait]
impl Notifications for Ear {
    async fn next(&mut self) -> ListenEvent {
        loop {
            if let Some(event) = self.inbox.take() {
                return event;
            }
            self.inbox.came.notified().await;
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.audience.leave(self.number);
    }
}

/// Keeps a connection for as long as somebody listens, and opens another when it is lost. Never returns.
async fn keep(engine: String, audience: Arc<Audience>, pool: Arc<Pool>) {
    let mut pause = PAUSE_MIN;
    for number in 0.. {
        audience.until_wanted().await;
        let began = Instant::now();
        let failed = match Line::open(number, &audience, &pool).await {
            Ok(line) => match line.serve().await {
                Ok(()) => false,
                Err(lost) => {
                    warn!(%engine, cause = %lost, "the listeners' connection is lost");
                    true
                }
            },
            Err(error) => {
                debug!(%engine, cause = %error, "cannot open the listeners' connection");
                audience.refuse(&error);
                true
            }
        };
        audience.lock().line = None;
        if failed {
            // After one that has lasted, the next is worth a try soon; one that is lost at once is as good as none.
            if began.elapsed() > PAUSE_MAX {
                pause = PAUSE_MIN;
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// The listeners' connection.
struct Line {
    audience: Arc<Audience>,
    backend: Backend,
    /// How long the server may take to answer.
    answer_timeout: Duration,
    /// The channels that PostgreSQL has confirmed.
    confirmed: HashSet<ChannelName>,
    /// When the server last answered.
    answered: Instant,
    /// Since when nobody listens.
    unused_since: Option<Instant>,
}

/// What there is to do.
enum Next {
    /// For those of these numbers, PostgreSQL is to listen to these channels too.
    Listen(Vec<(u64, Vec<ChannelName>)>),
    /// Nobody listens to these any more.
    Unlisten(Vec<ChannelName>),
    /// To ask the server whether it is there.
    Ping,
    /// Nobody has listened for a while.
    Close,
    /// Nothing before then.
    Wait(Instant),
}

impl Line {
    /// Opens the connection of that number, and has PostgreSQL listen on it to what is listened to already.
    async fn open(number: u64, audience: &Arc<Audience>, pool: &Pool) -> Result<Self, CheckoutError> {
        let hearing = audience.clone();
        let notified: Notified =
            Arc::new(move |notification: &tokio_postgres::Notification| hearing.hear(number, notification));
        let backend = pool.open_listening(notified).await?;
        let mut line = Self {
            audience: audience.clone(),
            backend,
            answer_timeout: pool.connect_options().connect_timeout,
            confirmed: HashSet::new(),
            answered: Instant::now(),
            unused_since: None,
        };
        let wanted: Vec<_> = audience.lock().inboxes.keys().cloned().collect();
        let listened = line.must(&commands("LISTEN", &wanted)).await;
        listened.map_err(|lost| CheckoutError::Unreachable(lost.to_string()))?;
        line.confirmed.extend(wanted);
        audience.lock().resume(number);
        Ok(line)
    }

    /// Serves until nobody has listened for a while, or the connection is lost.
    async fn serve(mut self) -> Result<(), Lost> {
        loop {
            match self.look(Instant::now()) {
                Next::Listen(waiting) => self.listen(waiting).await?,
                Next::Unlisten(channels) => {
                    self.must(&commands("UNLISTEN", &channels)).await?;
                    for channel in &channels {
                        self.confirmed.remove(channel);
                    }
                }
                Next::Ping => self.must(&["SELECT 1".to_owned()]).await?,
                Next::Close => return Ok(()),
                Next::Wait(until) => tokio::select! {
                    lost = self.backend.wire.lost() => return Err(lost),
                    () = self.audience.changed.notified() => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }

    /// What there is to do now, or when to look again.
    fn look(&mut self, now: Instant) -> Next {
        let state = self.audience.lock();
        let unconfirmed = |listener: &Listener| -> Vec<ChannelName> {
            listener.channels.iter().filter(|channel| !self.confirmed.contains(*channel)).cloned().collect()
        };
        let waiting: Vec<_> = state.waiting().map(|(number, listener)| (number, unconfirmed(listener))).collect();
        if !waiting.is_empty() {
            return Next::Listen(waiting);
        }
        let is_unwanted = |channel: &&ChannelName| !state.inboxes.contains_key(*channel);
        let unwanted: Vec<_> = self.confirmed.iter().filter(is_unwanted).cloned().collect();
        if !unwanted.is_empty() {
            return Next::Unlisten(unwanted);
        }
        let mut wake = self.answered + SILENCE;
        if wake <= now {
            return Next::Ping;
        }
        if state.listeners.is_empty() {
            let close = *self.unused_since.get_or_insert(now) + UNUSED;
            if close <= now {
                return Next::Close;
            }
            wake = wake.min(close);
        } else {
            self.unused_since = None;
        }
        Next::Wait(wake)
    }

    /// Has PostgreSQL listen to these channels too, and tells each of those that wait what came of it. With nothing new
    /// for one of them it is an empty query, whose answer says that the connection is there.
    async fn listen(&mut self, waiting: Vec<(u64, Vec<ChannelName>)>) -> Result<(), Lost> {
        let texts: Vec<_> = waiting.iter().map(|(_, channels)| command("LISTEN", channels)).collect();
        let answers = self.ask(&texts).await?;
        let mut state = self.audience.lock();
        for ((number, channels), answer) in waiting.into_iter().zip(answers) {
            match answer {
                Ok(()) => {
                    self.confirmed.extend(channels);
                    state.admit(number);
                }
                Err(refusal) => state.refuse(number, CheckoutError::Refused(refusal)),
            }
        }
        Ok(())
    }

    /// Asks for what PostgreSQL has no reason to refuse. A connection on which it does is of no use.
    async fn must(&mut self, texts: &[String]) -> Result<(), Lost> {
        for answer in self.ask(texts).await? {
            answer.map_err(|refusal| Lost(refusal.to_string()))?;
        }
        Ok(())
    }

    /// Asks for each of these, one right behind the other; what PostgreSQL refuses of one, no other feels.
    async fn ask(&mut self, texts: &[String]) -> Result<Vec<Result<(), Box<PgError>>>, Lost> {
        let client = &self.backend.client;
        let asking: Vec<_> = texts.iter().map(|text| client.batch_execute(text)).collect();
        let answers = timeout(self.answer_timeout, join_all(asking)).await.map_err(|_| {
            let within = humantime::format_duration(self.answer_timeout);
            Lost(format!("the server did not answer within {within}"))
        })?;
        self.answered = Instant::now();
        let read = answers.into_iter().map(|answer| match answer {
            Ok(()) => Ok(Ok(())),
            Err(error) => refusal(&error).map(Err),
        });
        read.collect()
    }
}

/// What PostgreSQL said no with. An error that ends the connection is its loss.
fn refusal(error: &tokio_postgres::Error) -> Result<Box<PgError>, Lost> {
    match error.as_db_error() {
        Some(refusal) if !matches!(refusal.parsed_severity(), Some(Severity::Fatal | Severity::Panic)) => {
            Ok(Box::new(pg_error(refusal)))
        }
        Some(fatal) => Err(Lost(fatal.to_string())),
        None => Err(Lost(error.to_string())),
    }
}

/// The same command for many channels, in as few messages as make sense.
fn commands(verb: &str, channels: &[ChannelName]) -> Vec<String> {
    channels.chunks(CHANNELS_AT_ONCE).map(|channels| command(verb, channels)).collect()
}

/// The same command for each of these channels. PostgreSQL takes all of it or nothing.
fn command(verb: &str, channels: &[ChannelName]) -> String {
    let commands = channels.iter().map(|channel| format!("{verb} {}", quoted_identifier(channel.as_str())));
    commands.collect::<Vec<_>>().join("; ")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one of these is held, so a poisoned one holds sound facts.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(payload: &str) -> Arc<Notification> {
        Arc::new(Notification { channel: "news".into(), payload: payload.into(), backend_pid: 1 })
    }

    #[test]
    fn what_finds_no_room_is_missed_in_its_place_and_said_once() {
        let inbox = Inbox::default();
        let (large, small) = (notification(&"x".repeat(Inbox::BYTES_MAX / 2)), notification("y"));
        inbox.begin();
        for notification in [&large, &large, &large, &small] {
            inbox.put(notification);
        }
        inbox.miss();
        let told: Vec<_> = std::iter::from_fn(|| inbox.take()).collect();
        let expected = [
            ListenEvent::Listening,
            ListenEvent::Notification(large.clone()),
            ListenEvent::Missed,
            ListenEvent::Notification(small),
            ListenEvent::Missed,
        ];
        assert_eq!(told, expected);
        // All of its room is there again.
        inbox.put(&large);
        assert_eq!(inbox.take(), Some(ListenEvent::Notification(large)));
    }

    #[test]
    fn a_channels_name_cannot_leave_its_quotes() {
        let channels = ["a\"; DROP", "B"].map(|name| ChannelName::new("channels", name).unwrap());
        assert_eq!(command("LISTEN", &channels), "LISTEN \"a\"\"; DROP\"; LISTEN \"B\"");
        assert_eq!(command("LISTEN", &[]), "");
        assert!(commands("LISTEN", &[]).is_empty());
    }
}
