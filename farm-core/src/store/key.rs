//! Where each artifact of a job lives below the store's prefix.

use crate::id::{AttemptNo, JobId};

/// `jobs/{job}`: the folder of all that is of the job.
pub fn job(job: JobId) -> String {
    format!("jobs/{job}")
}

/// `jobs/{job}/attempt/{n}/clip.mp4`
pub fn clip(job: JobId, attempt: AttemptNo) -> String {
    format!("jobs/{job}/attempt/{attempt}/clip.mp4")
}

/// The attempt of a [`clip`] of the job, if `key` is one.
pub fn clip_attempt(job: JobId, key: &str) -> Option<AttemptNo> {
    let rest = key.strip_prefix("jobs/")?.strip_prefix(&job.to_string())?.strip_prefix("/attempt/")?;
    let attempt = AttemptNo(rest.strip_suffix("/clip.mp4")?.parse().ok()?);
    (clip(job, attempt) == key).then_some(attempt)
}

/// `jobs/{job}/result.json`: created once, names the accepted attempt.
pub fn result(job: JobId) -> String {
    format!("jobs/{job}/result.json")
}

/// `jobs/{job}/latent`: the folder of the latent checkpoints that any attempt at the job may go on from.
pub fn latents(job: JobId) -> String {
    format!("jobs/{job}/latent")
}

/// `{folder}/{step}.safetensors`: the checkpoint after `step` steps, with five digits at least.
pub fn latent(folder: &str, step: u32) -> String {
    format!("{folder}/{step:05}.safetensors")
}

/// The step of a [`latent`] in `folder`, if `key` is one.
pub fn latent_step(folder: &str, key: &str) -> Option<u32> {
    let step = key.strip_prefix(folder)?.strip_prefix('/')?.strip_suffix(".safetensors")?.parse().ok()?;
    (latent(folder, step) == key).then_some(step)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_clips_key_says_its_attempt() {
        let [job, other] = [7, 8].map(|n| JobId(Uuid::from_u128(n)));
        assert_eq!(clip_attempt(job, &clip(job, AttemptNo(12))), Some(AttemptNo(12)));
        let strange = [clip(other, AttemptNo(1)), result(job), clip(job, AttemptNo(1)).replace("/1/", "/01/")];
        assert!(strange.iter().all(|key| clip_attempt(job, key).is_none()));
    }

    #[test]
    fn a_latents_key_says_its_step_and_sorts_by_it() {
        let [folder, other] = [7, 8].map(|n| latents(JobId(Uuid::from_u128(n))));
        assert_eq!(latent_step(&folder, &latent(&folder, 123)), Some(123));
        assert!(latent(&folder, 9) < latent(&folder, 10));
        let strange =
            ["", "/1.safetensors", "/+0001.safetensors", "/00001.mp4", "/x.safetensors", "/a/00001.safetensors"];
        let strange = strange.map(|end| format!("{folder}{end}"));
        assert!(strange.iter().chain([&latent(&other, 1)]).all(|key| latent_step(&folder, key).is_none()));
    }
}
