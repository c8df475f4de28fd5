use super::runner::{Size, run};

#[test]
fn many_schedules_keep_all_invariants() {
    for seed in 0..200 {
        let outcome = run(seed, Size::Small, false);
        if outcome.broken.is_some() {
            let again = run(seed, Size::Small, true);
            panic!("seed {seed}: {}\n{}", outcome.broken.unwrap(), again.trace.join("\n"));
        }
    }
}
