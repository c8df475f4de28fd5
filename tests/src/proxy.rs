//! Stands in front of a server and spoils what passes, both ways.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::dice::Dice;
use crate::network::Network;

/// Of so many pieces, one is spoiled.
const ONE_IN: usize = 6;
/// Bytes that are passed on at a time, at most.
const PIECE: usize = 16 << 10;

/// What happens to some of the pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Calm = 0,
    /// A bit is another.
    Corrupt = 1,
    /// The piece comes twice.
    Repeat = 2,
    /// The connection ends instead.
    Hangup = 3,
}

/// A proxy on a host of a network. It takes no more connections when it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    weather: AtomicU8,
    /// By weather.
    struck: [AtomicU64; 4],
    stop: AtomicBool,
}

impl Proxy {
    /// Listens on the host's second address, and passes what comes there on to the first, at the same port.
    pub fn start(network: &Arc<Network>, host: usize, port: u16, seed: u64) -> Self {
        let shared = Arc::new(Shared { weather: AtomicU8::new(0), struck: Default::default(), stop: false.into() });
        let work = {
            let (network, shared) = (network.clone(), shared.clone());
            move || {
                network.enter(host).expect("the thread gets into the namespace");
                let listener = TcpListener::bind((network.second_address(host), port)).expect("the proxy listens");
                listener.set_nonblocking(true).expect("a socket that does not block");
                let to = SocketAddrV4::new(network.address(host), port);
                // Threads started from here are on the host too.
                serve(&listener, to, seed, &shared);
            }
        };
        Self { shared, thread: Some(std::thread::spawn(work)) }
    }

    pub fn set(&self, weather: Weather) {
        self.shared.weather.store(weather as u8, Ordering::Relaxed);
    }

    /// Pieces that were spoiled in this way.
    pub fn struck(&self, weather: Weather) -> u64 {
        self.shared.struck[weather as usize].load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            panic!("a proxy's thread panicked");
        }
    }
}

fn serve(listener: &TcpListener, to: SocketAddrV4, seed: u64, shared: &Arc<Shared>) {
    let mut dice = Dice::new(seed);
    while !shared.stop.load(Ordering::Relaxed) {
        let Ok((client, _)) = listener.accept() else {
            // Nobody has come, or somebody who has left again.
            std::thread::park_timeout(Duration::from_millis(10));
            continue;
        };
        let seeds = [dice.roll(1 << 30), dice.roll(1 << 30)].map(|seed| seed as u64);
        let shared = shared.clone();
        // A client whose server is not there is hung up on.
        std::thread::spawn(move || pass(client, to, seeds, &shared));
    }
}

fn pass(client: TcpStream, to: SocketAddrV4, seeds: [u64; 2], shared: &Arc<Shared>) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let server = TcpStream::connect_timeout(&to.into(), Duration::from_secs(5))?;
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
    }
    let (back, shared_back) = ((server.try_clone()?, client.try_clone()?), shared.clone());
    std::thread::spawn(move || copy(back.0, back.1, Dice::new(seeds[1]), &shared_back));
    copy(client, server, Dice::new(seeds[0]), shared)
}

/// Until either end closes.
fn copy(mut from: TcpStream, mut to: TcpStream, mut dice: Dice, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let copied = loop {
        let piece = match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(length) => &mut buffer[..length],
            Err(error) => break Err(error),
        };
        let weather = shared.weather.load(Ordering::Relaxed);
        let strikes = weather != Weather::Calm as u8 && dice.roll(ONE_IN) == 0;
        if strikes {
            shared.struck[weather as usize].fetch_add(1, Ordering::Relaxed);
        }
        let mut times = 1;
        match weather {
            _ if !strikes => {}
            w if w == Weather::Corrupt as u8 => piece[dice.roll(piece.len())] ^= 1 << dice.roll(8),
            w if w == Weather::Repeat as u8 => times = 2,
            _ => break Ok(()),
        }
        if let Err(error) = (0..times).try_for_each(|_| to.write_all(piece)) {
            break Err(error);
        }
    };
    // Whoever has closed already does not mind.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
    copied
}
