//! A device of this node decodes tiles of an attempt that may be any node's.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use farm_core::id::AttemptKey;
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::FailureKind;
use farm_core::model::latent::LatentCheckpoint;
use farm_core::store::key;
use farm_core::wire::to_node::HelpDecode;

use super::{Failure, Workshop};
use crate::checkpoints::max_bytes;
use crate::decode::max_message;
use crate::device_thread::{Decode, Reservation};

/// Joins the decode and works until its crew needs this hand no more. `reservation` is dropped when the device is idle.
pub async fn run(workshop: Arc<Workshop>, help: HelpDecode, reservation: Reservation, stop: Arc<AtomicBool>) {
    let (key, device) = (help.key, help.device);
    match try_help(&workshop, help, reservation, stop).await {
        Ok(()) => tracing::info!(attempt = %key, %device, "helped with a decode"),
        // The decode goes on without it.
        Err(Failure { message, .. }) => tracing::warn!(attempt = %key, %device, %message, "cannot help with a decode"),
    }
}

async fn try_help(
    workshop: &Arc<Workshop>,
    help: HelpDecode,
    reservation: Reservation,
    stop: Arc<AtomicBool>,
) -> Result<(), Failure> {
    let failure = |error: &dyn std::fmt::Display| Failure::new(FailureKind::Device, error);
    let spec: RenderSpec = serde_json::from_str(&help.spec_json).map_err(|error| failure(&error))?;
    workshop.model(&help.model, &help.model_hash)?;
    let name = format!("{} {}", workshop.node, help.device);
    let joined = workshop.data.join(&help.url, &help.token, &name, max_bytes(&spec), max_message(&spec)).await;
    let joined = joined.map_err(|error| failure(&error))?;
    let stored = match joined.latent {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::warn!(attempt = %help.key, %error, "the latent comes from the store instead");
            from_store(workshop, help.key, &spec).await?
        }
    };
    let hash = help.model_hash.clone();
    let latent = {
        let spec = spec.clone();
        tokio::task::spawn_blocking(move || LatentCheckpoint::from_bytes(&stored, &spec, &hash))
    };
    let latent = latent.await.map_err(|error| failure(&error))?.map_err(|error| failure(&error))?;
    if latent.step != spec.num_inference_steps {
        return Err(failure(&format!("a latent of step {} cannot be decoded", latent.step)));
    }
    let handle = workshop.devices.get(help.device.0 as usize);
    let handle = handle.ok_or_else(|| failure(&format!("no device {}", help.device)))?;
    let shape = spec.latent_shape();
    let work = Decode { model: help.model, shape, latent: Arc::new(latent), link: joined.link, stop };
    Ok(handle.decode(work, reservation).await?)
}

/// The finished latent is in the store before anybody is asked to decode it.
async fn from_store(workshop: &Workshop, attempt: AttemptKey, spec: &RenderSpec) -> Result<Bytes, Failure> {
    let key = key::latent(&key::latents(attempt.job), spec.num_inference_steps);
    Ok(workshop.store.get(&key, max_bytes(spec)).await?)
}
