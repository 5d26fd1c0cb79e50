"""The zoo's flow-matching SanaPipeline, untrained (linear attention, convolutions between its layers), and who teaches it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from fewstep.denoiser import Cond, Denoiser
from fewstep.families import FAMILIES
from fewstep.families.attention import instruction
from fewstep.matched import Matched
from fewstep.zoo.grammar import UNASKED
from fewstep.zoo.teachers import TEXT_WIDTH, asked
from fewstep.zoo.words import gemma_tokenizer

WIDTH, HEADS = 128, 4


def sana(vae: AutoencoderDC, **noise: Any) -> SanaPipeline:
    """Transformer of about 1.6 M parameters on patches of 2x2, and a three-layer Gemma2 text encoder.

    noise: settings of its scheduler."""
    tokenizer = gemma_tokenizer("\n".join(instruction(SanaPipeline)))
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_WIDTH // 4,
            query_pre_attn_scalar=TEXT_WIDTH // 4,
            attn_logit_softcapping=None,
            layer_types=["full_attention"] * 3,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    channels = vae.config.latent_channels
    transformer = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=6,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=WIDTH // HEADS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.0,
        sample_size=16,
        patch_size=2,
    )
    return SanaPipeline(tokenizer, text, vae, transformer, FlowMatchEulerDiscreteScheduler(**noise))


class Sana(nn.Module):
    """What is trained of `sana`: the text encoder (to read, `fewstep.zoo.grammar`), then the transformer.

    tutor: whose velocity the transformer learns; the data's own where there is none."""

    def __init__(self, pipe: SanaPipeline, captions: list[str], tutor: Tutor | None = None) -> None:
        super().__init__()
        self.net, self.text = pipe.transformer, pipe.text_encoder
        family = FAMILIES["SanaPipeline"]
        self.denoiser = Denoiser(self.net, family.schedule(pipe.scheduler), "flow", family.call)
        opening = "\n".join(instruction(type(pipe)))
        texts = [opening + caption for caption in ("", *captions)]
        tokens = pipe.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        # The instruction ends in a space, which belongs to the caption's first word.
        begun = len(pipe.tokenizer(opening).input_ids) - 1
        self.opening, self.tokens = tokens.input_ids[:1, :begun], tokens.input_ids[:, begun:]
        self.mask = tokens.attention_mask[:, begun:]
        answers = asked(pipe.tokenizer, captions, self.tokens).where(self.mask[..., None] > 0, UNASKED)
        self.asked = F.pad(answers, (0, 0, 1, 0), value=UNASKED)
        self.tutor = tutor

    def hidden(self, rows: Tensor) -> Tensor:
        """The text encoder's states (B, L, width) of the captions with these numbers, as the pipeline takes them: the sentence's
        beginning, then the caption as it is read after the pipeline's instruction, which is read once."""
        read = self.text(self.opening, use_cache=True)
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(rows))
        mask = F.pad(self.mask[rows], (self.opening.shape[1], 0), value=1)
        said = self.text(self.tokens[rows], attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
        return torch.cat([read.last_hidden_state[:, :1].expand(len(rows), -1, -1), said], 1)

    def lengths(self, rows: Tensor) -> Tensor:
        """How many states (B,) of each caption are its own; without a prompt there is no instruction, and one."""
        return torch.where(rows > 0, 1 + self.mask[rows].sum(1), 1)

    def cond(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers; 0 is none."""
        return Cond({"prompt": self.hidden(rows), "length": self.lengths(rows)})

    def loss(self, x0: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Velocity regression at uniform times (Lipman et al. 2022)."""
        t = torch.rand(len(x0), generator=rng, dtype=torch.float64).clamp_min(1e-4)
        eps = torch.randn(x0.shape, generator=rng)
        if self.tutor is not None:
            t = self.tutor.within(t)
        x_t = self.denoiser.schedule.add_noise(x0, eps, t)
        aim = eps - x0 if self.tutor is None else self.tutor(x_t, t, rows)
        return F.mse_loss(self.denoiser(x_t, t, self.cond(rows)).velocity, aim)


class Tutor:
    """Another teacher of the zoo, on the same latents, as a flow: under guidance 1 it says the mean of what the pictures that may
    be behind an x_t say, without their noise.

    reader: whose `cond` says what the teacher is told of a caption's number. matched: the teacher on the straight path."""

    def __init__(self, reader: Any, matched: Matched) -> None:
        self.reader, self.matched = reader, matched

    def within(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1], moved to between the first and last time that the teacher was asked at."""
        return self.matched.lowest + (self.matched.highest - self.matched.lowest) * t

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The velocity (B, C, H, W) at x_t and t (B,) for the captions with these numbers."""
        return self.matched(x_t, t, self.reader.cond(rows)).velocity
