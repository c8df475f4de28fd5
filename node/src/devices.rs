//! Which devices of this machine a command uses.

use std::num::NonZeroUsize;
use std::str::FromStr;

/// More devices than this on one node is a typing error.
const MAX_DEVICES: usize = 256;

/// `cpu:K`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    pub cpus: usize,
}

impl FromStr for Devices {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.strip_prefix("cpu:").ok_or("write cpu:K, for example cpu:2")?;
        match count.parse() {
            Ok(cpus) if (1..=MAX_DEVICES).contains(&cpus) => Ok(Self { cpus }),
            _ => Err(format!("{count:?} is not a number in 1..={MAX_DEVICES}")),
        }
    }
}

impl Devices {
    /// Compute threads of each device: as asked, or the processor's cores divided among the devices.
    pub fn threads(self, asked: Option<NonZeroUsize>) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        asked.map_or_else(|| (cores / self.cpus).max(1), NonZeroUsize::get)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_documented_and_nothing_else() {
        assert_eq!("cpu:2".parse(), Ok(Devices { cpus: 2 }));
        for bad in ["", "cpu", "cpu:", "cpu:0", "cpu:-1", "cpu:257", "gpu:1", "2"] {
            assert!(bad.parse::<Devices>().is_err(), "{bad}");
        }
    }
}
