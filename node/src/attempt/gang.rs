//! Denoising on the devices of a lease, one rank on each.

use std::sync::Arc;

use farm_core::comm::{Patience, local};
use farm_core::id::DeviceIndex;
use farm_core::model::pipeline::Start;
use farm_core::parallel::group::RankGroup;
use farm_core::wire::to_node::StartAttempt;
use futures::future::{join, join_all};

use super::{Lease, Workshop};
use crate::checkpoints::{Checkpoints, Slot};
use crate::device_thread::{Denoise, Denoised, DeviceHandle, Monitor, RenderError};

/// The finished latent of the clip, from the leader. An attempt that is to be handed over ends with
/// [`RenderError::HandedOver`] once its latent is in the store, or cannot be put there.
pub(super) async fn denoise(
    workshop: &Arc<Workshop>,
    start: &StartAttempt,
    checkpoints: &Checkpoints,
    from: Start,
    lease: &Lease,
    monitor: &Monitor,
) -> Result<Denoised, RenderError> {
    let handles = handles(workshop, start)?;
    // The scheduler writes its own line into the job's log when it hands the attempt out.
    let (attempt, devices) = (start.key, &start.devices);
    tracing::info!(%attempt, ?devices, topology = %start.topology, model = start.model, "attempt starts");
    let from = Arc::new(from);
    let (slot, inbox) = Slot::new(workshop.checkpoint_steps);
    let ranks = local::ranks(handles.len(), Patience::default()).into_iter().zip(devices.iter().zip(handles));
    let ranks = ranks.map(|(rank, (device, handle))| {
        let group = RankGroup::new(start.topology, Arc::new(rank)).map_err(RenderError::device)?;
        let not_held = || RenderError::device(format!("device {device} is not held"));
        let reservation = lease.get(device).ok_or_else(not_held)?.clone();
        let work = Denoise {
            model: start.model.clone(),
            spec: (*checkpoints.spec).clone(),
            group,
            start: from.clone(),
            checkpoints: slot.clone(),
            monitor: monitor.clone(),
        };
        Ok(handle.denoise(work, reservation))
    });
    let ranks = ranks.collect::<Result<Vec<_>, RenderError>>()?;
    // From here on only the devices' threads have it, and let go of it.
    drop(slot);
    let saved = |step| monitor.progress.save(step);
    let (denoised, ()) = join(join_all(ranks), checkpoints.save_all(inbox, &saved)).await;
    of_all(denoised, devices)
}

/// The devices of the lease, by rank.
fn handles<'a>(workshop: &'a Workshop, start: &StartAttempt) -> Result<Vec<&'a DeviceHandle>, RenderError> {
    let (devices, topology) = (&start.devices, start.topology);
    if devices.len() != topology.world() {
        let message = format!("{topology} needs {} devices, the lease has {}", topology.world(), devices.len());
        return Err(RenderError::device(message));
    }
    let known = workshop.devices.len();
    let handle = |device: &DeviceIndex| {
        let missing = || RenderError::device(format!("no device {device}, the node has {known}"));
        workshop.devices.get(device.0 as usize).ok_or_else(missing)
    };
    devices.iter().map(handle).collect()
}

/// The leader's latent, or what ended the group: the leader's hand-over, or the failure of the first rank that failed by
/// itself, if any did.
fn of_all(denoised: Vec<Result<Denoised, RenderError>>, devices: &[DeviceIndex]) -> Result<Denoised, RenderError> {
    let mut ended = None;
    let mut latent = None;
    for (rank, denoised) in denoised.into_iter().enumerate() {
        match denoised {
            Ok(denoised) if rank == 0 => latent = Some(denoised),
            Ok(_) => {}
            Err(error @ RenderError::HandedOver { .. }) => return Err(error),
            Err(RenderError::Failed { kind, message }) => {
                let place = match devices {
                    [_] => String::new(),
                    _ => format!("rank {rank} of {} (device {}): ", devices.len(), devices[rank]),
                };
                return Err(RenderError::Failed { kind, message: place + &message });
            }
            Err(error) => {
                ended.get_or_insert(error);
            }
        }
    }
    match (ended, latent) {
        (None, Some(latent)) => Ok(latent),
        (Some(error), _) => Err(error),
        (None, None) => Err(RenderError::device("the group has no leader")),
    }
}
