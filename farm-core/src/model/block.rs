//! One block of the asymmetric transformer: a visual and a text stream that meet in one attention.

use crate::engine::{Engine, Over, Qkv, RopeTable};
use crate::model::ModelError;
use crate::model::config::DitConfig;
use crate::model::layers::{FeedForward, Linear, Modulation, Observer};
use crate::model::weights::Tensors;
use crate::parallel::attention::{JointOut, joint_attention};
use crate::parallel::group::RankGroup;
use crate::parallel::shard::Shares;

/// What a block reads and writes, for one branch of the guidance: the rows of this rank.
pub(super) struct Streams<E: Engine> {
    /// Visual tokens `[rows, hidden_x]`.
    pub x: E::Tensor,
    /// Text tokens `[rows, hidden_y]`, valid ones only; none in the null branch, or if all are with other ranks.
    pub y: Option<E::Tensor>,
    /// Text tokens of all ranks.
    pub text_rows: usize,
    /// `silu(c)` `[hidden_x]`, the same for all blocks.
    pub conditioning: E::Tensor,
}

pub(super) struct Block<E: Engine> {
    x: Projections<E>,
    /// scale_msa, gate_msa, scale_mlp, gate_mlp.
    mod_x: Modulation<E, 4>,
    proj_x: Linear<E>,
    mlp_x: FeedForward<E>,
    y: Projections<E>,
    text: TextUpdate<E>,
    heads: usize,
    head_dim: usize,
}

/// What the blocks of one call share.
pub(super) struct Sequence<'a, E: Engine> {
    pub group: &'a RankGroup<E>,
    /// Visual tokens of all ranks.
    pub tokens: usize,
    /// Of this rank's tokens.
    pub rope: &'a RopeTable<E::Tensor>,
}

/// The q, k, v projection of one stream with its norms.
struct Projections<E: Engine> {
    qkv: Linear<E>,
    q_norm: E::Tensor,
    k_norm: E::Tensor,
}

/// How a block treats the text stream.
enum TextUpdate<E: Engine> {
    /// Attend and update it.
    Full { mod_y: Modulation<E, 4>, proj_y: Linear<E>, mlp_y: FeedForward<E> },
    /// The last block only lets the visual tokens attend to it: nothing reads the text after it.
    KeysOnly { scale: Modulation<E, 1> },
}

impl<E: Engine> Projections<E> {
    fn load(
        loader: &dyn Tensors<E>,
        block: usize,
        stream: char,
        width: usize,
        config: &DitConfig,
    ) -> Result<Self, ModelError> {
        let norm = |which: char| {
            loader.tensor(&format!("blocks.{block}.attn.{which}_norm_{stream}.weight"), &[config.head_dim])
        };
        let over = if stream == 'x' { Over::Tokens } else { Over::Few };
        let qkv = format!("blocks.{block}.attn.qkv_{stream}");
        let out = 3 * config.num_heads * config.head_dim;
        Ok(Projections {
            qkv: Linear::load_without_bias(loader, &qkv, out, width, over)?,
            q_norm: norm('q')?,
            k_norm: norm('k')?,
        })
    }

    /// Queries, keys and values of `rms(stream) · (1 + scale)`.
    fn apply(
        &self,
        engine: &E,
        stream: &E::Tensor,
        scale: &E::Tensor,
        heads: usize,
        rope: Option<&RopeTable<E::Tensor>>,
    ) -> Result<Qkv<E::Tensor>, ModelError> {
        let packed = self.qkv.apply(engine, &engine.modulated_rms_norm(stream, scale)?)?;
        Ok(engine.split_qkv(&packed, &self.q_norm, &self.k_norm, heads, rope)?)
    }
}

impl<E: Engine> Block<E> {
    pub fn load(loader: &dyn Tensors<E>, config: &DitConfig, block: usize) -> Result<Self, ModelError> {
        let (d, dy) = (config.hidden_x, config.hidden_y);
        let name = |part: &str| format!("blocks.{block}.{part}");
        let text = if block + 1 == config.num_layers {
            TextUpdate::KeysOnly { scale: Modulation::load(loader, &name("mod_y"), dy, d)? }
        } else {
            TextUpdate::Full {
                mod_y: Modulation::load(loader, &name("mod_y"), dy, d)?,
                proj_y: Linear::load(loader, &name("attn.proj_y"), dy, d, Over::Few)?,
                mlp_y: FeedForward::load(loader, &name("mlp_y"), dy, config.ffn_y, Over::Few)?,
            }
        };
        Ok(Block {
            x: Projections::load(loader, block, 'x', d, config)?,
            mod_x: Modulation::load(loader, &name("mod_x"), d, d)?,
            proj_x: Linear::load(loader, &name("attn.proj_x"), d, d, Over::Tokens)?,
            mlp_x: FeedForward::load(loader, &name("mlp_x"), d, config.ffn_x, Over::Tokens)?,
            y: Projections::load(loader, block, 'y', dy, config)?,
            text,
            heads: config.num_heads,
            head_dim: config.head_dim,
        })
    }

    /// Updates `streams` in place. `name` is the block's name for `observe`.
    pub fn forward(
        &self,
        engine: &E,
        streams: &mut Streams<E>,
        sequence: &Sequence<'_, E>,
        name: &str,
        observe: Observer<'_, E::Tensor>,
    ) -> Result<(), ModelError> {
        let [scale_msa, gate_msa, scale_mlp, gate_mlp] = self.mod_x.apply(engine, &streams.conditioning)?;
        let x = self.x.apply(engine, &streams.x, &scale_msa, self.heads, Some(sequence.rope))?;
        let text = match &streams.y {
            Some(y) => Some(self.text_step(engine, y, &streams.conditioning)?),
            None => None,
        };
        let topology = sequence.group.topology();
        let shares = Shares::new(topology, sequence.tokens, streams.text_rows, self.heads, self.head_dim);
        let text_asks = matches!(self.text, TextUpdate::Full { .. });
        let own_text = text.as_ref().map(|text| &text.qkv);
        let JointOut { visual, text: attended_text } =
            joint_attention(engine, sequence.group, shares, &x, own_text, text_asks)?;

        // What is read no more is dropped at once: the largest tensors of a clip are here, and what is alive in the
        // feed-forward would be twice as much.
        drop(x);
        let attended = self.proj_x.apply(engine, &visual)?;
        drop(visual);
        observe(&format!("{name}.attn_x"), &attended);
        streams.x = engine.gated_residual(&streams.x, &attended, &gate_msa)?;
        drop(attended);
        streams.x = residual_mlp(engine, &streams.x, &self.mlp_x, &scale_mlp, &gate_mlp)?;
        observe(&format!("{name}.x"), &streams.x);

        if let (Some(y), Some(text), Some(attended)) = (&mut streams.y, &text, &attended_text)
            && let Some(update) = &text.update
        {
            let [gate_msa, scale_mlp, gate_mlp] = &update.modulation;
            let attended = update.proj.apply(engine, attended)?;
            let updated = engine.gated_residual(y, &attended, gate_msa)?;
            *y = residual_mlp(engine, &updated, update.mlp, scale_mlp, gate_mlp)?;
        }
        if let Some(y) = &streams.y {
            observe(&format!("{name}.y"), y);
        }
        Ok(())
    }

    fn text_step(&self, engine: &E, y: &E::Tensor, conditioning: &E::Tensor) -> Result<TextStep<'_, E>, ModelError> {
        let (scale_msa, update) = match &self.text {
            TextUpdate::Full { mod_y, proj_y, mlp_y } => {
                let [scale_msa, gate_msa, scale_mlp, gate_mlp] = mod_y.apply(engine, conditioning)?;
                let modulation = [gate_msa, scale_mlp, gate_mlp];
                (scale_msa, Some(PendingUpdate { modulation, proj: proj_y, mlp: mlp_y }))
            }
            TextUpdate::KeysOnly { scale } => {
                let [scale_msa] = scale.apply(engine, conditioning)?;
                (scale_msa, None)
            }
        };
        Ok(TextStep { qkv: self.y.apply(engine, y, &scale_msa, self.heads, None)?, update })
    }
}

/// The text stream inside one block.
struct TextStep<'a, E: Engine> {
    qkv: Qkv<E::Tensor>,
    /// None in the last block.
    update: Option<PendingUpdate<'a, E>>,
}

/// What updates the text after the attention.
struct PendingUpdate<'a, E: Engine> {
    /// gate_msa, scale_mlp, gate_mlp.
    modulation: [E::Tensor; 3],
    proj: &'a Linear<E>,
    mlp: &'a FeedForward<E>,
}

/// `x + rms(mlp(rms(x) · (1 + scale))) · tanh(gate)`.
fn residual_mlp<E: Engine>(
    engine: &E,
    x: &E::Tensor,
    mlp: &FeedForward<E>,
    scale: &E::Tensor,
    gate: &E::Tensor,
) -> Result<E::Tensor, ModelError> {
    let branch = mlp.apply(engine, engine.modulated_rms_norm(x, scale)?)?;
    Ok(engine.gated_residual(x, &branch, gate)?)
}
