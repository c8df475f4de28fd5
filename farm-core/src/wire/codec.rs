//! The only place that knows bincode: a version byte, then the envelope, at most [`MAX_ENVELOPE_BYTES`].

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Envelope, MAX_ENVELOPE_BYTES, PROTOCOL};

#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("message of {bytes} bytes is over the limit of {MAX_ENVELOPE_BYTES}")]
    TooLarge { bytes: usize },
    #[error("empty message")]
    Empty,
    #[error("peer speaks protocol {got}, this program speaks {PROTOCOL}; run the same version on both")]
    Version { got: u8 },
    #[error("{0} bytes left over after the message")]
    Trailing(usize),
    #[error("message does not decode: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    #[error("message does not encode: {0}")]
    Encode(#[from] bincode::error::EncodeError),
}

// The limit bounds what a hostile length prefix can make the decoder allocate.
fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_ENVELOPE_BYTES>()
}

pub fn encode<B: Serialize>(envelope: &Envelope<B>) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![PROTOCOL];
    bytes.extend(bincode::serde::encode_to_vec(envelope, config())?);
    if bytes.len() > MAX_ENVELOPE_BYTES {
        return Err(CodecError::TooLarge { bytes: bytes.len() });
    }
    Ok(bytes)
}

pub fn decode<B: DeserializeOwned>(bytes: &[u8]) -> Result<Envelope<B>, CodecError> {
    if bytes.len() > MAX_ENVELOPE_BYTES {
        return Err(CodecError::TooLarge { bytes: bytes.len() });
    }
    let (&version, body) = bytes.split_first().ok_or(CodecError::Empty)?;
    if version != PROTOCOL {
        return Err(CodecError::Version { got: version });
    }
    let (envelope, read) = bincode::serde::decode_from_slice(body, config())?;
    if read != body.len() {
        return Err(CodecError::Trailing(body.len() - read));
    }
    Ok(envelope)
}
