//! A network between two ends that does what it is told.

use std::net::SocketAddr;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What happens to what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weather {
    Fine,
    /// Connections that are open pass nothing on; new ones do.
    Frozen,
    /// After about so many bytes of a connection it is cut, or a bit of it damaged, as the seed has it.
    Stormy {
        seed: u64,
        bytes: usize,
    },
    /// No connection is or stays open.
    Down,
}

pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    told: watch::Sender<(Weather, u64)>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    pub(super) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tells, told) = watch::channel((Weather::Fine, 0));
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            for number in 0u64.. {
                let (client, _) = listener.accept().await.unwrap();
                let (born, cuts) = *told.borrow();
                if born == Weather::Down {
                    continue;
                }
                let server = TcpStream::connect(target).await.unwrap();
                let told = told.clone();
                connections.spawn(async move {
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    let damage = |way: u64| Damage::new(born, number * 2 + way);
                    tokio::select! {
                        () = copy(from_client, to_server, told.clone(), cuts, damage(0)) => {}
                        () = copy(from_server, to_client, told.clone(), cuts, damage(1)) => {}
                    }
                });
            }
        });
        Self { address, told: tells, _accepting: accepting }
    }

    pub(super) fn set(&self, weather: Weather) {
        self.told.send_modify(|told| told.0 = weather);
    }

    /// Ends the connections that are open.
    pub(super) fn cut(&self) {
        self.told.send_modify(|told| told.1 += 1);
    }

    /// `url` by way of this proxy.
    pub(super) fn of(&self, url: &str) -> String {
        let path = url.splitn(4, '/').nth(3).unwrap();
        format!("http://{}/{path}", self.address)
    }
}

struct Damage {
    born: Weather,
    /// Bytes until it strikes.
    left: usize,
    random: StdRng,
}

impl Damage {
    fn new(born: Weather, number: u64) -> Self {
        let (seed, bytes) = match born {
            Weather::Stormy { seed, bytes } => (seed, bytes),
            _ => (0, usize::MAX),
        };
        let mut random = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003) + number);
        let left = if bytes == usize::MAX { bytes } else { random.random_range(0..bytes * 2) };
        Self { born, left, random }
    }

    /// False if the connection is cut.
    fn strikes(&mut self, piece: &mut [u8]) -> bool {
        let Some(hit) = piece.get_mut(self.left) else {
            self.left -= piece.len();
            return true;
        };
        *hit ^= 1 << self.random.random_range(0..8);
        self.left = usize::MAX;
        self.random.random_bool(0.5)
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut told: watch::Receiver<(Weather, u64)>,
    cuts: u64,
    mut damage: Damage,
) {
    let mut piece = vec![0; 16 << 10];
    loop {
        let (weather, cut) = *told.borrow_and_update();
        if weather == Weather::Down || cut > cuts {
            return;
        }
        let frozen = weather == Weather::Frozen && damage.born != Weather::Frozen;
        tokio::select! {
            read = from.read(&mut piece), if !frozen => match read {
                Ok(read) if read > 0 => {
                    let whole = damage.strikes(&mut piece[..read]);
                    if to.write_all(&piece[..read]).await.is_err() || !whole {
                        return;
                    }
                }
                _ => return,
            },
            changed = told.changed() => if changed.is_err() { return },
        }
    }
}
