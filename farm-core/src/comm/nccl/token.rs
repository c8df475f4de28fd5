//! What ranks tell each other beside NCCL: which tensor comes next. Small messages over another transport, which also
//! knows who lives and who is waited for; NCCL knows neither.

use crate::comm::CommError;
use crate::engine::{AttentionOut, EngineError, Result, SequenceOps, Transfer};

/// Says that a tensor of this shape goes out.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    shape: Vec<usize>,
    /// None but for the id of a group.
    bytes: Vec<u8>,
}

impl Token {
    pub(super) fn of(tensor: &impl Transfer) -> Self {
        Self { shape: tensor.sizes(), bytes: Vec::new() }
    }

    /// Bytes for all ranks; they expect the shape `[bytes]`.
    pub(super) fn bytes(bytes: Vec<u8>) -> Self {
        Self { shape: vec![bytes.len()], bytes }
    }

    pub(super) fn into_bytes<const N: usize>(self) -> std::result::Result<[u8; N], CommError> {
        let len = self.bytes.len();
        self.bytes.try_into().map_err(|_| CommError::Transport(format!("an id of {len} bytes, expected {N}")))
    }
}

impl Transfer for Token {
    fn sizes(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Carries tokens between processes. It does not compute.
pub struct Tokens;

fn refused<T>(op: &'static str) -> Result<T> {
    Err(EngineError::Backend { op, message: "tokens have no values".into() })
}

impl SequenceOps for Tokens {
    type Tensor = Token;

    fn reshape(&self, _: &Token, _: &[usize]) -> Result<Token> {
        refused("reshape")
    }

    fn narrow(&self, _: &Token, _: usize, _: usize, _: usize) -> Result<Token> {
        refused("narrow")
    }

    fn concat(&self, _: &[&Token], _: usize) -> Result<Token> {
        refused("concat")
    }

    fn to_bytes(&self, token: &Token) -> Result<Vec<u8>> {
        Ok(token.bytes.clone())
    }

    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Token> {
        Ok(Token { shape: shape.to_vec(), bytes: bytes.to_vec() })
    }

    fn attention(&self, _: &Token, _: &[&Token], _: &[&Token]) -> Result<AttentionOut<Token>> {
        refused("attention")
    }

    fn merge_attention(&self, _: &AttentionOut<Token>, _: &AttentionOut<Token>) -> Result<AttentionOut<Token>> {
        refused("merge_attention")
    }
}
