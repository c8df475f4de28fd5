//! The first words on a connection. Who dials says who it is and whom it looks for; who is dialled welcomes it or says
//! why not; who dialled confirms. Only then both count the connection as theirs, so what a process that is gone left in
//! a backlog is never taken for a rank.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: [u8; 8] = *b"mochicom";
const VERSION: u16 = 1;
/// Longest name of a group, and longest text of a refusal.
pub(super) const MAX_TEXT: usize = 1 << 10;
const CONFIRMED: u8 = 1;

/// Who talks: one rank of a group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Identity {
    pub(super) rank: usize,
    pub(super) world: usize,
    /// Has to be equal on all ranks.
    pub(super) group: String,
}

#[derive(Debug)]
pub(super) enum Refused {
    /// The other rank or this one says why; it will say so again.
    ForGood(String),
    /// Whatever this was, the right rank may be there the next time.
    ForNow(String),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::ForNow(match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                "the connection was closed during the handshake; is TLS used on one side only?".into()
            }
            _ => error.to_string(),
        })
    }
}

/// Introduces this rank to rank `to` and waits to be welcomed.
pub(super) async fn dial<S>(stream: &mut S, me: &Identity, to: usize) -> Result<(), Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut hello = Vec::from(MAGIC);
    hello.extend(VERSION.to_le_bytes());
    hello.extend([me.world, me.rank, to, me.group.len()].iter().flat_map(|number| (*number as u32).to_le_bytes()));
    hello.extend(me.group.as_bytes());
    stream.write_all(&hello).await?;
    stream.flush().await?;

    expect_magic(stream).await?;
    let text = text(stream).await?;
    if !text.is_empty() {
        return Err(Refused::ForGood(text));
    }
    stream.write_all(&[CONFIRMED]).await?;
    stream.flush().await?;
    Ok(())
}

/// Hears who dialled. `free` says whether a rank is still missing; it is asked before the rank is welcomed.
pub(super) async fn answer<S>(stream: &mut S, me: &Identity, free: impl Fn(usize) -> bool) -> Result<usize, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    expect_magic(stream).await?;
    let version = stream.read_u16_le().await?;
    let verdict = if version == VERSION {
        let (world, from) = (stream.read_u32_le().await?, stream.read_u32_le().await?);
        let (to, group) = (stream.read_u32_le().await?, text(stream).await?);
        let from = Identity { rank: from as usize, world: world as usize, group };
        refusal(me, &from, to as usize, free).map_or(Ok(from.rank), Err)
    } else {
        Err(format!("rank {} speaks version {VERSION} of the protocol, the one that dialled {version}", me.rank))
    };
    let text = verdict.as_ref().err().map_or("", |text| &text[..text.floor_char_boundary(MAX_TEXT)]);
    let mut answer = Vec::from(MAGIC);
    answer.extend((text.len() as u32).to_le_bytes());
    answer.extend(text.as_bytes());
    stream.write_all(&answer).await?;
    stream.flush().await?;

    let from = verdict.map_err(Refused::ForGood)?;
    if stream.read_u8().await? != CONFIRMED {
        return Err(Refused::ForNow(format!("rank {from} did not confirm")));
    }
    Ok(from)
}

/// Why rank `from` cannot be linked with rank `me`, in words for both.
fn refusal(me: &Identity, from: &Identity, to: usize, free: impl Fn(usize) -> bool) -> Option<String> {
    let (here, there) = (me.rank, from.rank);
    if from.group != me.group {
        let (ours, theirs) = (&me.group, &from.group);
        return Some(format!("rank {there} is of the group {theirs:?}, rank {here} of the group {ours:?}"));
    }
    if from.world != me.world {
        return Some(format!("rank {there} counts {} ranks, rank {here} counts {}", from.world, me.world));
    }
    if to != here {
        let hint = "are the peers in the same order everywhere?";
        return Some(format!("rank {there} looks for rank {to} where rank {here} is; {hint}"));
    }
    if there <= here || there >= me.world {
        return Some(format!("rank {there} of {} does not dial rank {here}", me.world));
    }
    (!free(there)).then(|| format!("rank {there} is there already; was it started twice?"))
}

async fn expect_magic<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(), Refused> {
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic).await?;
    if magic == MAGIC {
        return Ok(());
    }
    Err(Refused::ForNow("what is there does not speak the protocol of a group; is TLS used on one side only?".into()))
}

async fn text<S: AsyncRead + Unpin>(stream: &mut S) -> Result<String, Refused> {
    let len = stream.read_u32_le().await? as usize;
    if len > MAX_TEXT {
        return Err(Refused::ForNow(format!("a text of {len} bytes, at most {MAX_TEXT} are taken")));
    }
    let mut text = vec![0; len];
    stream.read_exact(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meet(dials: &Identity, to: usize, answers: &Identity) -> (Result<(), Refused>, Result<usize, Refused>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut a, mut b) = tokio::io::duplex(64);
            tokio::join!(dial(&mut a, dials, to), answer(&mut b, answers, |rank| rank != 3))
        })
    }

    fn rank(rank: usize) -> Identity {
        Identity { rank, world: 5, group: "clip 7, cfg 1 ring 1 ulysses 5".into() }
    }

    #[test]
    fn ranks_of_one_group_are_linked() {
        let (dialled, answered) = meet(&rank(2), 1, &rank(1));
        assert_eq!((dialled.unwrap(), answered.unwrap()), ((), 2));
    }

    #[test]
    fn a_refusal_says_why_on_both_sides() {
        let other = Identity { group: "clip 8".into(), ..rank(2) };
        let fewer = Identity { world: 4, ..rank(2) };
        for (dials, to, expected) in [
            (other, 1, r#"rank 2 is of the group "clip 8", rank 1 of the group "clip 7, cfg 1 ring 1 ulysses 5""#),
            (fewer, 1, "rank 2 counts 4 ranks, rank 1 counts 5"),
            (rank(2), 0, "rank 2 looks for rank 0 where rank 1 is; are the peers in the same order everywhere?"),
            (rank(0), 1, "rank 0 of 5 does not dial rank 1"),
            (rank(9), 1, "rank 9 of 5 does not dial rank 1"),
            (rank(3), 1, "rank 3 is there already; was it started twice?"),
        ] {
            let (dialled, answered) = meet(&dials, to, &rank(1));
            let (Err(Refused::ForGood(dialled)), Err(Refused::ForGood(answered))) = (dialled, answered) else {
                panic!("{expected}");
            };
            assert_eq!((&*dialled, &*answered), (expected, expected));
        }
    }

    #[test]
    fn strangers_and_quitters_are_not_taken_for_ranks() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let hello = |group_len: u32| {
            let mut hello = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
            [5, 2, 1, group_len].iter().for_each(|number: &u32| hello.extend(number.to_le_bytes()));
            hello.extend(rank(2).group.as_bytes());
            hello
        };
        let whole = hello(rank(2).group.len() as u32);
        // The last one leaves after a perfect hello.
        for words in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &MAGIC, &whole[..20], &hello(u32::MAX), &whole] {
            let answered = runtime.block_on(async {
                let (mut stranger, mut stream) = tokio::io::duplex(1 << 10);
                stranger.write_all(words).await.unwrap();
                stranger.shutdown().await.unwrap();
                answer(&mut stream, &rank(1), |_| true).await
            });
            assert!(matches!(answered, Err(Refused::ForNow(_))), "{answered:?} for {words:?}");
        }
    }
}
