use proptest::prelude::*;

use super::*;

const GIGA: f64 = 1e9;

fn site() -> Site {
    let device = DeviceRates {
        linear: 100e12,
        attention: 80e12,
        memory: 48.0 * GIGA,
        bandwidth: 800.0 * GIGA,
        value_bytes: 2,
        shared_weights: false,
    };
    Site::one_host(device, LinkRates { bandwidth: 30.0 * GIGA, latency: 20e-6 })
}

fn clip() -> ClipShape {
    ClipShape::new(848, 480, 49, 64, [256, 0]).unwrap()
}

fn small() -> ModelShape {
    ModelShape {
        layers: 3,
        heads: 6,
        head_dim: 32,
        hidden_x: 192,
        hidden_y: 96,
        ffn_x: 512,
        ffn_y: 256,
        text_dim: 64,
        time_dim: 64,
        channels: 12,
    }
}

fn all(site: &Site, devices: usize) -> Vec<Candidate> {
    candidates(&ModelShape::mochi1(), &clip(), site, devices, Overrides::default()).unwrap()
}

fn one(site: &Site, cfg: usize, ring: usize, ulysses: usize, shard: bool) -> Candidate {
    let fixed = Overrides { cfg: Some(cfg), ring: Some(ring), ulysses: Some(ulysses), shard: Some(shard) };
    candidates(&ModelShape::mochi1(), &clip(), site, cfg * ring * ulysses, fixed).unwrap()[0]
}

#[test]
fn one_rank_sends_nothing() {
    let [solo] = all(&site(), 1)[..] else { panic!("one device has one way") };
    assert_eq!((solo.topology, solo.shard, solo.bytes), (Topology::SOLO, false, 0));
    assert!(solo.fits);
}

#[test]
fn bytes_of_a_clip_are_its_layers_plus_the_velocities() {
    let (model, clip) = (ModelShape::mochi1(), clip());
    let t = Topology::new(2, 3, 1).unwrap();
    let layers: u64 = 48 * sent_values_per_layer(t, 0, clip.tokens, 256, 24, 128);
    let velocity = (clip.tokens / 3 * 48) * 2 + clip.tokens * 48;
    let expected = 2 * 64 * (layers + velocity as u64);
    assert_eq!(one(&site(), 2, 3, 1, false).bytes, expected);
    let held = (0..48).map(|layer| model.block_parameters(layer).div_ceil(6) * 5).sum::<u64>();
    assert_eq!(one(&site(), 2, 3, 1, true).bytes, expected + 2 * 64 * held);
}

#[test]
fn all_legal_ways_are_listed_once_best_first() {
    let list = all(&site(), 6);
    let mut expected = Topology::of_world(6, 24, clip().tokens);
    expected.extend(expected.clone());
    expected.sort();
    let mut got: Vec<_> = list.iter().map(|candidate| candidate.topology).collect();
    got.sort();
    assert_eq!(got, expected, "every topology with and without shared weights");
    assert!(list.is_sorted_by_key(|candidate| candidate.seconds), "all of them fit");
    assert_eq!(list[0].topology.cfg(), 2, "branches have the least to say to each other: {list:?}");
}

#[test]
fn what_a_person_fixes_stays_fixed() {
    let fixed = Overrides { ring: Some(2), shard: Some(true), ..Overrides::default() };
    let list = candidates(&ModelShape::mochi1(), &clip(), &site(), 12, fixed).unwrap();
    assert_eq!(list.len(), 2);
    assert!(list.iter().all(|candidate| candidate.topology.ring() == 2 && candidate.shard));
}

#[test]
fn degrees_that_cannot_be_are_refused_with_the_reason() {
    let error = |devices, cfg, ring, ulysses| {
        let fixed = Overrides { cfg, ring, ulysses, shard: None };
        let tiny = ClipShape { tokens: 13, text: [0, 0], steps: 1 };
        candidates(&small(), &tiny, &site(), devices, fixed).unwrap_err().to_string()
    };
    assert!(error(6, Some(2), Some(3), Some(2)).contains("needs 12 devices, there are 6"));
    assert!(error(6, None, None, Some(4)).contains("needs 4 devices, there are 6"));
    assert!(error(6, Some(3), None, None).contains("1 or 2"));
    assert!(error(9, None, Some(3), Some(1)).contains("1 or 2"), "nothing but cfg is free");
    assert!(error(6, None, Some(0), None).contains("degree of 0"));
    assert!(error(0, None, None, None).contains("degree of 0"));
    assert!(error(8, None, None, Some(8)).contains("8 ulysses ranks share 6 heads"));
    assert!(error(17, None, None, None).contains("17 sequence ranks share 13 tokens"));
    assert!(error(65, None, None, None).contains("more than 64"));
    assert!(error(usize::MAX, None, Some(usize::MAX), Some(2)).contains("more than 64"));
}

#[test]
fn memory_decides_before_speed() {
    let mut tight = site();
    // 20 GB of weights do not fit, a third of them does.
    tight.device.memory = 16.0 * GIGA;
    assert_eq!(predict(&ModelShape::mochi1(), &clip(), &tight, 1), None);
    let best = predict(&ModelShape::mochi1(), &clip(), &tight, 3).unwrap();
    assert!(best.shard && best.fits && best.memory < 16_000_000_000);
    assert!(all(&tight, 3).iter().all(|candidate| candidate.fits == candidate.shard));
    tight.device.shared_weights = true;
    assert!(all(&tight, 3).iter().all(|candidate| candidate.fits), "one copy of the weights for three devices");
}

#[test]
fn weights_are_shared_only_where_that_hides_or_is_needed() {
    // Much arithmetic per byte: gathering hides, but buys nothing where everything fits.
    let best = all(&site(), 4)[0];
    assert!(!best.shard, "{best:?}");
    assert_eq!(one(&site(), 2, 1, 2, true).seconds, one(&site(), 2, 1, 2, false).seconds);
    let mut slow = site();
    slow.inside.bandwidth = 1.0 * GIGA;
    assert!(one(&slow, 2, 1, 2, true).seconds > 1.5 * one(&slow, 2, 1, 2, false).seconds);
}

#[test]
fn a_ring_hides_its_traffic_and_an_exchange_of_heads_does_not() {
    // With a free link the ring's merges make it slower; on a slow one that attention still hides, it wins.
    let seconds = |bandwidth: f64| {
        let mut site = site();
        site.inside.bandwidth = bandwidth * GIGA;
        (one(&site, 1, 2, 1, false).seconds, one(&site, 1, 1, 2, false).seconds)
    };
    let ((ring_fast, ulysses_fast), (ring_slow, ulysses_slow)) = (seconds(3000.0), seconds(30.0));
    assert!(ring_slow - ring_fast < 0.1 * (ulysses_slow - ulysses_fast));
    assert!(ring_slow < ulysses_slow);
    // Slower than the attention: no longer hidden.
    assert!(seconds(1.0).0 > 2.0 * ring_fast);
}

#[test]
fn between_hosts_the_slow_link_is_shared_and_counts() {
    let mut hosts = site();
    hosts.between = LinkRates { bandwidth: 1.0 * GIGA, latency: 50e-6 };
    hosts.devices_per_host = 2;
    // Four ranks on two hosts: branches apart, sequence ranks together.
    let best = all(&hosts, 4)[0];
    assert_eq!((best.topology.cfg(), best.shard), (2, false));
    assert!(best.seconds < 1.05 * all(&site(), 4)[0].seconds, "only velocities go between the hosts");
    let across = |devices_per_host| {
        hosts.devices_per_host = devices_per_host;
        one(&hosts, 1, 1, 4, false).seconds
    };
    let [apart, pairs, together] = [1, 2, 4].map(across);
    assert!(together < apart && apart < pairs, "two ranks of a host share its link: {together} {apart} {pairs}");
}

#[test]
fn a_ring_is_taken_only_if_it_gains_enough() {
    let of = |ring: usize, ulysses: usize, seconds, fits| {
        let topology = Topology::new(1, ring, ulysses).unwrap();
        Candidate { topology, shard: false, seconds, bytes: 0, memory: 0, fits }
    };
    let taken = |candidates: &[Candidate]| choose(candidates).unwrap().topology.ring();
    assert_eq!(taken(&[of(4, 1, 10.0, true), of(2, 2, 10.1, true), of(1, 4, 10.9, true)]), 1);
    assert_eq!(taken(&[of(4, 1, 10.0, true), of(1, 4, 11.1, true)]), 4);
    assert_eq!(taken(&[of(1, 4, 10.0, true), of(2, 2, 10.0, true)]), 1);
    assert_eq!(taken(&[of(4, 1, 10.0, true), of(1, 4, 10.0, false)]), 4, "one that does not fit is no choice");
    assert_eq!(choose(&[]), None);
}

#[test]
fn a_candidate_is_stored_flat_and_read_back() {
    let candidate = one(&site(), 2, 1, 3, true);
    let json = serde_json::to_value(candidate).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys.len(), 9);
    for (key, value) in [("cfg", 2), ("ring", 1), ("ulysses", 3), ("world", 6)] {
        assert_eq!(json[key], value);
    }
    assert_eq!(serde_json::from_value::<Candidate>(json.clone()).unwrap(), candidate);
    let mut bad = json;
    bad["ring"] = 0.into();
    assert!(serde_json::from_value::<Candidate>(bad).unwrap_err().to_string().contains("degree of 0"));
}

proptest! {
    #[test]
    fn predictions_are_finite_and_no_group_beats_the_work_divided_by_its_size(
        devices in 1usize..=24, tokens in 24usize..3000, text in 0usize..=256, hosts in 1usize..=3,
    ) {
        let clip = ClipShape { tokens, text: [text, 0], steps: 4 };
        let mut site = site();
        site.devices_per_host = devices.div_ceil(hosts);
        let model = small();
        let flops = |layer: usize, text: usize| {
            let attention = model.attention_flops(tokens + text, tokens + text, model.heads);
            model.linear_flops(layer, tokens, text) / site.device.linear + attention / site.device.attention
        };
        let work: f64 = (0..model.layers).map(|layer| flops(layer, text) + flops(layer, 0)).sum::<f64>() * 4.0;
        let Ok(list) = candidates(&model, &clip, &site, devices, Overrides::default()) else { return Ok(()) };
        for candidate in &list {
            prop_assert!(candidate.seconds.is_finite() && candidate.memory > 0);
            prop_assert!(candidate.seconds >= work / devices as f64 * (1.0 - 1e-9), "{candidate:?}, work {work}");
            prop_assert_eq!(candidate.bytes == 0, devices == 1);
        }
        if devices == 1 {
            let moved = |text| model.elementwise_values(tokens, text) * 2.0 / site.device.bandwidth;
            let weights: f64 = (0..3).map(|layer| model.block_parameters(layer) as f64 * 2.0 / site.device.bandwidth).sum();
            let most = work + 4.0 * (3.0 * (moved(text) + moved(0)) + 2.0 * weights);
            prop_assert!(list[0].seconds <= most * (1.0 + 1e-9), "nothing is counted twice");
        }
    }

    #[test]
    fn uneven_shares_cost_what_the_largest_costs(ulysses in 2usize..=12) {
        // 24 heads and 14 310 tokens: never faster than the largest share of both, in an ideal world of arithmetic alone.
        let mut ideal = site();
        ideal.inside = LinkRates { bandwidth: 1e30, latency: 0.0 };
        ideal.device.bandwidth = 1e30;
        let model = ModelShape { layers: 48, ..ModelShape::mochi1() };
        let clip = ClipShape { text: [0, 0], ..clip() };
        let fixed = Overrides { cfg: Some(1), ring: Some(1), shard: Some(false), ulysses: Some(ulysses) };
        let got = candidates(&model, &clip, &ideal, ulysses, fixed).unwrap()[0].seconds;
        let linear = model.linear_flops(0, clip.tokens.div_ceil(ulysses), 0) / ideal.device.linear;
        let attention = model.attention_flops(clip.tokens, clip.tokens, 24usize.div_ceil(ulysses)) / ideal.device.attention;
        let expected = 64.0 * 2.0 * 48.0 * (linear + attention);
        prop_assert!((got / expected - 1.0).abs() < 1e-6, "{got} {expected}");
    }
}

/// Published by xdit-project/mochi-xdit for 848×480, 49 frames, 64 steps. One number of the rates, the L40's efficiency,
/// is from the first row; the speed-ups are predicted.
#[test]
fn the_published_speed_ups_on_l40_are_predicted() {
    const PUBLISHED: [(usize, usize, usize, f64); 4] =
        [(1, 1, 1, 394.0), (1, 1, 2, 222.0), (2, 1, 1, 198.0), (2, 3, 1, 74.0)];
    let devices = devices::Devices::embedded().unwrap();
    let site = Site::one_host(devices.device("l40").unwrap(), devices.link("pcie4").unwrap());
    let solo = one(&site, 1, 1, 1, false).seconds;
    println!("l40, pcie4, 848x480, 49 frames, 64 steps     published         predicted");
    for (cfg, ring, ulysses, published) in PUBLISHED {
        let candidate = one(&site, cfg, ring, ulysses, false);
        let (predicted, speed_up, expected) = (candidate.seconds, solo / candidate.seconds, PUBLISHED[0].3 / published);
        let off = 100.0 * (speed_up / expected - 1.0);
        let name = candidate.topology.to_string();
        println!("{name:<36} {published:7.0} s {expected:5.2}x {predicted:8.1} s {speed_up:5.2}x {off:+6.1} %");
        assert!(off.abs() <= 15.0, "{name}: speed-up {speed_up:.2}, published {expected:.2}");
        assert!((predicted / published - 1.0).abs() <= 0.15, "{name}: {predicted:.1} s, published {published} s");
    }
}
