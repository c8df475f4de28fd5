//! Which devices decode a clip whose latent is finished: the rule, as a function.
//!
//! Denoising wants fast links between its devices, decoding hardly any, and devices that can only decode are good for
//! nothing else. So decoding goes to those first. Devices that a clip waits for are left to it, but for one: a clip never
//! waits for its decode.

use farm_core::id::DeviceIndex;

/// What there is to decode with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stock<P> {
    /// Idle devices of nodes that only decode.
    pub decoders: Vec<P>,
    /// Other idle devices, that no clip waits for.
    pub spare: Vec<P>,
    /// Other idle devices, that are kept for clips that wait.
    pub wanted: Vec<P>,
    /// Devices that the attempt has left of its lease, its leader's first.
    pub own: Vec<DeviceIndex>,
    /// Whether those may decode by the role of their node.
    pub own_decode: bool,
    /// Whether a clip waits that could be rendered on them.
    pub own_wanted: bool,
}

/// Who decodes: devices of the attempt, which keeps them, and others, which are told to help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hands<P> {
    pub keep: Vec<DeviceIndex>,
    pub helpers: Vec<P>,
}

/// Chooses who decodes a clip of `tiles`, at least one device if there is any, and no more devices than tiles. Earlier
/// ones of each list are taken first.
pub fn hands<P>(tiles: usize, stock: Stock<P>) -> Hands<P> {
    let Stock { decoders, spare, wanted, mut own, own_decode, own_wanted } = stock;
    let tiles = tiles.max(1);
    let mut helpers: Vec<P> = decoders.into_iter().take(tiles).collect();
    let first = own.first().copied();
    // No byte of them crosses the network.
    own.truncate(if own_decode && !own_wanted { tiles - helpers.len() } else { 0 });
    let mut keep = own;
    let missing = tiles - helpers.len() - keep.len();
    helpers.extend(spare.into_iter().take(missing));
    if helpers.is_empty() && keep.is_empty() {
        match first {
            // Whatever its role and whoever wants it: what it would wait for may never come.
            Some(leader) => keep.push(leader),
            None => helpers.extend(wanted.into_iter().take(1)),
        }
    }
    Hands { keep, helpers }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Devices of others are numbered through: decoders from 100, spare ones from 200, wanted ones from 300.
    fn stock(decoders: u32, spare: u32, wanted: u32, own: u32) -> Stock<u32> {
        Stock {
            decoders: (100..100 + decoders).collect(),
            spare: (200..200 + spare).collect(),
            wanted: (300..300 + wanted).collect(),
            own: (0..own).map(DeviceIndex).collect(),
            own_decode: true,
            own_wanted: false,
        }
    }

    fn chosen(tiles: usize, stock: Stock<u32>) -> (Vec<u32>, Vec<u32>) {
        let Hands { keep, helpers } = hands(tiles, stock);
        (keep.into_iter().map(|device| device.0).collect(), helpers)
    }

    #[test]
    fn devices_that_only_decode_come_first_then_ones_own_then_others() {
        assert_eq!(chosen(2, stock(3, 3, 0, 3)), (vec![], vec![100, 101]));
        assert_eq!(chosen(4, stock(1, 3, 0, 2)), (vec![0, 1], vec![100, 200]));
        assert_eq!(chosen(18, stock(1, 2, 1, 2)), (vec![0, 1], vec![100, 200, 201]));
    }

    #[test]
    fn a_clip_that_waits_gets_the_denoising_devices() {
        let waited_for = |decoders, spare| Stock { own_wanted: true, ..stock(decoders, spare, 2, 4) };
        assert_eq!(chosen(18, waited_for(2, 0)), (vec![], vec![100, 101]));
        assert_eq!(chosen(18, waited_for(0, 1)), (vec![], vec![200]));
        assert_eq!(chosen(18, waited_for(0, 0)), (vec![0], vec![]), "but for one");
    }

    #[test]
    fn a_clip_never_waits_for_its_decode() {
        let denoisers = Stock { own_decode: false, ..stock(0, 0, 1, 2) };
        assert_eq!(chosen(18, denoisers.clone()), (vec![0], vec![]), "whatever its role");
        assert_eq!(chosen(18, Stock { own: Vec::new(), ..denoisers }), (vec![], vec![300]), "whoever it is kept for");
        assert_eq!(chosen(18, stock(0, 0, 0, 0)), (vec![], vec![]), "there is no device");
    }

    fn stocks() -> impl Strategy<Value = Stock<u32>> {
        (0..9u32, 0..9u32, 0..9u32, 0..9u32, any::<bool>(), any::<bool>()).prop_map(
            |(decoders, spare, wanted, own, own_decode, own_wanted)| Stock {
                own_decode,
                own_wanted,
                ..stock(decoders, spare, wanted, own)
            },
        )
    }

    proptest! {
        #[test]
        fn hands_are_devices_that_there_are_each_once_and_no_more_than_tiles(tiles in 0..30usize, stock in stocks()) {
            let Hands { keep, helpers } = hands(tiles, stock.clone());
            prop_assert!(keep.len() + helpers.len() <= tiles.max(1));
            prop_assert!(stock.own.starts_with(&keep));
            let mut others = [&stock.decoders[..], &stock.spare, &stock.wanted].concat();
            for helper in &helpers {
                let at = others.iter().position(|device| device == helper);
                prop_assert!(at.is_some(), "{helper} is nobody's or is taken twice");
                others.swap_remove(at.unwrap());
            }
        }

        #[test]
        fn some_device_decodes_wherever_there_is_one(tiles in 0..30usize, stock in stocks()) {
            let Stock { decoders, spare, wanted, own, .. } = stock.clone();
            let devices = decoders.len() + spare.len() + wanted.len() + own.len();
            let Hands { keep, helpers } = hands(tiles, stock);
            prop_assert_eq!(keep.is_empty() && helpers.is_empty(), devices == 0);
        }

        #[test]
        fn what_a_clip_waits_for_is_taken_only_where_nothing_else_is_and_then_once(
            tiles in 0..30usize, stock in stocks()
        ) {
            let Hands { keep, helpers } = hands(tiles, stock.clone());
            let kept_for_others = if stock.own_wanted { keep.len() } else { 0 };
            let wanted = helpers.iter().filter(|helper| stock.wanted.contains(helper)).count();
            prop_assert!(kept_for_others + wanted <= 1);
            if kept_for_others + wanted == 1 {
                prop_assert_eq!(keep.len() + helpers.len(), 1);
            }
        }

        #[test]
        fn no_device_idles_that_nobody_waits_for_while_tiles_are_more(tiles in 1..30usize, stock in stocks()) {
            let Hands { keep, helpers } = hands(tiles, stock.clone());
            let own = if stock.own_decode && !stock.own_wanted { stock.own.len() } else { 0 };
            let useful = stock.decoders.len() + stock.spare.len() + own;
            prop_assert!(keep.len() + helpers.len() >= useful.min(tiles));
        }
    }
}
