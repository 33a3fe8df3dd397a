//! A TCP proxy before a database, whose link can be slow, and can fall silent without closing.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

/// A proxy that passes what it is given, a little later.
pub(crate) struct Proxy {
    /// The database's URL, through the proxy.
    pub(crate) url: String,
    silence: watch::Sender<()>,
}

impl Proxy {
    /// Stands before the database at `url`; each piece takes `delay` each way.
    pub(crate) async fn start(url: &str, delay: Duration) -> Self {
        let real = url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = url.replace(&real, &listener.local_addr().unwrap().to_string());
        let (silence, silenced) = watch::channel(());
        tokio::spawn(async move {
            loop {
                let (caller, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(&real).await.unwrap();
                let mut silenced = silenced.clone();
                silenced.borrow_and_update();
                tokio::spawn(async move {
                    let (from_caller, to_caller) = caller.into_split();
                    let (from_server, to_server) = server.into_split();
                    tokio::select! {
                        // Whoever closes, both do.
                        () = pass(from_caller, to_server, delay) => {}
                        () = pass(from_server, to_caller, delay) => {}
                        _ = silenced.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Self { url, silence }
    }

    /// From now on, the connections there are neither pass anything nor close; new ones do.
    pub(crate) fn silence(&self) {
        self.silence.send(()).unwrap();
    }
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let mut piece = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        sleep(delay).await;
        if to.write_all(&piece[..count]).await.is_err() {
            return;
        }
    }
}
