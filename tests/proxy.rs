//! A TCP proxy before a database, whose links can be slow, fall silent without closing, or be cut, in the middle of a
//! COMMIT too; and that can be deaf to new ones.

use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::sleep;

/// As many bytes as are passed at once; a COMMIT on its own is far smaller.
const PIECE_BYTES: usize = 4 * 1024;

/// What happens to a link at a COMMIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtCommit {
    /// It is cut: COMMIT never reaches PostgreSQL.
    CutBefore,
    /// COMMIT is passed on, and the link cut: the answer never comes back.
    CutAfter,
    /// COMMIT is passed on, and nothing that comes back; the link stays.
    Withhold,
    /// It is cut on the caller's side: PostgreSQL waits for a COMMIT that never comes.
    Strand,
}

/// A proxy that passes what it is given, a little later.
pub(crate) struct Proxy {
    /// The database's URL, through the proxy.
    pub(crate) url: String,
    address: SocketAddr,
    /// Takes new links. None while the proxy is deaf.
    listening: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
}

/// What the proxy's owner and its links share.
struct Shared {
    /// The database's address.
    real: String,
    delay: Duration,
    silence: watch::Sender<()>,
    refuses: AtomicBool,
    holds_cancels: AtomicBool,
    at_next_commit: Mutex<Option<AtCommit>>,
    links: Mutex<Vec<AbortHandle>>,
}

impl Proxy {
    /// Stands before the database at `url`; each piece takes `delay` each way.
    pub(crate) async fn start(url: &str, delay: Duration) -> Self {
        let real = url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = url.replace(&real, &address.to_string());
        let shared = Arc::new(Shared {
            real,
            delay,
            silence: watch::Sender::new(()),
            refuses: AtomicBool::new(false),
            holds_cancels: AtomicBool::new(false),
            at_next_commit: Mutex::new(None),
            links: Mutex::new(Vec::new()),
        });
        let listening = Mutex::new(Some(tokio::spawn(listen(listener, shared.clone()))));
        Self { url, address, listening, shared }
    }

    /// From now on, the links there are neither pass anything nor close; new ones do.
    pub(crate) fn silence(&self) {
        self.shared.silence.send_replace(());
    }

    /// From now on, new links are closed at once; those there are go on.
    pub(crate) fn refuse(&self) {
        self.shared.refuses.store(true, Ordering::SeqCst);
    }

    /// From now on, new links pass again.
    pub(crate) fn admit(&self) {
        self.shared.refuses.store(false, Ordering::SeqCst);
    }

    /// From now on, new links are refused as if nobody were here; those there are go on.
    pub(crate) async fn deafen(&self) {
        let listening = self.listening.lock().unwrap().take().expect("it hears");
        listening.abort();
        // The port is closed when the task has gone.
        let _ = listening.await;
    }

    /// From now on, new links pass again.
    pub(crate) async fn hear(&self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        let listening = tokio::spawn(listen(listener, self.shared.clone()));
        *self.listening.lock().unwrap() = Some(listening);
    }

    /// From now on, requests to cancel a statement are taken, and neither passed on nor closed. All others pass.
    pub(crate) fn hold_cancels(&self) {
        self.shared.holds_cancels.store(true, Ordering::SeqCst);
    }

    /// What happens at the next COMMIT, on whichever link it comes. All others pass.
    pub(crate) fn at_next_commit(&self, what: AtCommit) {
        *self.shared.at_next_commit.lock().unwrap() = Some(what);
    }

    /// Cuts the link that `lot` falls on, if there is one.
    pub(crate) fn cut(&self, lot: usize) -> bool {
        let mut links = self.shared.links.lock().unwrap();
        links.retain(|link| !link.is_finished());
        if links.is_empty() {
            return false;
        }
        let unlucky = lot % links.len();
        links.swap_remove(unlucky).abort();
        true
    }
}

impl Shared {
    /// What is to happen to what a caller asks, if it is a COMMIT.
    fn at_commit(&self, asked: &[u8]) -> Option<AtCommit> {
        // Alone, or with the reset behind it.
        const COMMITS: [&[u8]; 2] = [b"COMMIT\0", b"COMMIT;"];
        let commits = asked.windows(7).any(|text| COMMITS.contains(&text));
        if commits { self.at_next_commit.lock().unwrap().take() } else { None }
    }

    async fn pause(&self) {
        if !self.delay.is_zero() {
            sleep(self.delay).await;
        }
    }
}

/// Takes new links for as long as it runs.
async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (caller, _) = listener.accept().await.unwrap();
        if shared.refuses.load(Ordering::SeqCst) {
            continue;
        }
        let link = tokio::spawn(link(caller, shared.clone(), shared.silence.subscribe()));
        let mut links = shared.links.lock().unwrap();
        links.retain(|link| !link.is_finished());
        links.push(link.abort_handle());
    }
}

/// Whether a caller asks to cancel the statement of another link: it begins with a length, and a code of its own.
async fn asks_to_cancel(caller: &TcpStream) -> bool {
    const CODE: [u8; 4] = 80_877_102_u32.to_be_bytes();
    let mut begins = [0; 8];
    loop {
        match caller.peek(&mut begins).await {
            Ok(8) => return begins[4..] == CODE,
            // The rest is on its way.
            Ok(1..) => tokio::task::yield_now().await,
            Ok(0) | Err(_) => return false,
        }
    }
}

/// One connection's way through the proxy.
async fn link(caller: TcpStream, shared: Arc<Shared>, mut silenced: watch::Receiver<()>) {
    if shared.holds_cancels.load(Ordering::SeqCst) && asks_to_cancel(&caller).await {
        // It still owns the socket, which stays open.
        return pending().await;
    }
    let Ok(server) = TcpStream::connect(&shared.real).await else { return };
    let (mut from_caller, mut to_caller) = caller.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    // They only borrow the sockets: a link that falls silent must not close them.
    let at_commit = tokio::select! {
        at_commit = ask(&mut from_caller, &mut to_server, &shared) => at_commit,
        () = answer(&mut from_server, &mut to_caller, &shared) => None,
        Ok(()) = silenced.changed() => pending().await,
    };
    match at_commit {
        // Whoever closes, both do.
        None => {}
        Some(AtCommit::CutBefore | AtCommit::CutAfter) => {
            drop((from_caller, to_caller));
            // PostgreSQL deals with what it has, and closes when it finds nobody there.
            drop(to_server);
            discard(&mut from_server).await;
        }
        Some(AtCommit::Strand) => {
            drop((from_caller, to_caller));
            discard(&mut from_server).await;
            drop(to_server);
        }
        Some(AtCommit::Withhold) => tokio::select! {
            () = discard(&mut from_server) => {}
            () = discard(&mut from_caller) => {}
        },
    }
}

/// Passes what the caller asks, up to a COMMIT at which something happens.
async fn ask(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, shared: &Shared) -> Option<AtCommit> {
    let mut piece = [0; PIECE_BYTES];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        let asked = &piece[..count];
        let at_commit = shared.at_commit(asked);
        if matches!(at_commit, Some(AtCommit::CutBefore | AtCommit::Strand)) {
            return at_commit;
        }
        shared.pause().await;
        if to.write_all(asked).await.is_err() {
            return None;
        }
        if at_commit.is_some() {
            return at_commit;
        }
    }
    None
}

/// Passes what the server answers.
async fn answer(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, shared: &Shared) {
    let mut piece = [0; PIECE_BYTES];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        shared.pause().await;
        if to.write_all(&piece[..count]).await.is_err() {
            return;
        }
    }
}

/// Reads to the end, and passes nothing.
async fn discard(from: &mut OwnedReadHalf) {
    let mut piece = [0; PIECE_BYTES];
    while let Ok(1..) = from.read(&mut piece).await {}
}
