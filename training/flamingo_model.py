"""The demo Flamingo in training: transformers' resampler and gated layers in a frozen language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import (
    IdeficsGatedCrossAttentionLayer as GatedLayer,
)
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler as Resampler
from transformers.models.idefics.vision import IdeficsVisionTransformer

from vlm_edge.export import demo_flamingo, demo_parts
from vlm_edge.training.frozen import Frozen
from vlm_edge.training.interleaved import seen_picture
from vlm_edge.training.packing import IGNORE, Packed

RANK = 32  # of the gated layers' feed-forward weights, 2.7 M parameters a layer at full rank
FIRST_GATE = 0.3  # the alphas' first value; the paper's zero learns slower
SHIFT = 80.0  # the norm of the tower's shift; that of what enters the tower is about 3


def configuration() -> IdeficsConfig:
    """The demo's configuration, for modules outside of a whole model."""
    config = IdeficsConfig(**demo_flamingo.model_config())
    config._attn_implementation = "sdpa"
    config.vision_config._attn_implementation = "sdpa"
    return config


@torch.no_grad()
def shift_of(dinov2: Any, pixels: torch.Tensor) -> torch.Tensor:
    """A shift [width] for `demo_flamingo.without_norm`, from what enters the tower for some pictures.

    Its direction is one along which that hardly varies and that the layers hardly read.
    """
    x = dinov2.embeddings(pixels).flatten(0, 1).double()
    x = x - x.mean(-1, keepdim=True)
    varied = x - x.mean(0)
    cost = varied.T @ varied / x.pow(2).sum()
    for layer in dinov2.encoder.layer[: demo_flamingo.VISION_LAYERS]:
        attention = layer.attention
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = torch.cat([part.weight for part in parts])
        for weight, norm in ((qkv, layer.norm1), (layer.mlp.fc1.weight, layer.norm2)):
            reads = (weight * norm.weight).double()
            cost += 1e-4 * reads.T @ reads / reads.pow(2).sum()
    one = torch.full_like(cost[0], len(cost) ** -0.5)  # no norm sees the mean: the shift has none
    centred = torch.eye(len(cost), dtype=cost.dtype) - one.outer(one)
    cost = centred @ cost @ centred + one.outer(one)
    direction = torch.linalg.eigh(cost).eigenvectors[:, 0]
    return (SHIFT * direction).half().float()  # as it ships


def load_tower(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The checkpoint's tower: pixel values [images, 3, 112, 112] -> [images, 65, 384]."""
    tower = IdeficsVisionTransformer(configuration().vision_config).eval()
    arrays = demo_flamingo.tower(
        demo_parts.vision_tensors(demo_parts.find_parts()["vision"]), shift.numpy()
    )
    tower.load_state_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in arrays.items()})

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        return tower(pixels).last_hidden_state

    return features


def low_rank(full: nn.Linear) -> nn.Module:
    """The same layer as two, with RANK channels between them."""
    first = nn.Linear(full.in_features, RANK, bias=False)
    second = nn.Linear(RANK, full.out_features, bias=False)
    return nn.Sequential(first, second)


class Flamingo(nn.Module):
    """What is trained; its names are the checkpoint's, but for the factors of low-rank weights."""

    def __init__(self, config: IdeficsConfig, shift: torch.Tensor) -> None:
        super().__init__()
        features, width = config.vision_config.embed_dim, config.hidden_size
        self.interval, self.first_added = config.cross_layer_interval, config.vocab_size
        self.vision_model = nn.Module()  # frozen; its shift ships with the trained weights
        self.vision_model.register_buffer("shift", shift)
        perceiver = config.perceiver_config
        self.perceiver_resampler = Resampler(
            config,
            features,
            perceiver.resampler_depth,
            perceiver.resampler_n_heads,
            perceiver.resampler_head_dim,
            perceiver.resampler_n_latents,
        )
        count = config.num_hidden_layers // self.interval
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedLayer(config, layer_idx=number) for number in range(count)
        )
        layer: Any  # nn.Module's own annotations know no parts
        for layer in self.gated_cross_attn_layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(layer.mlp, name, low_rank(getattr(layer.mlp, name)))
            nn.init.zeros_(layer.mlp.down_proj[1].weight)
            for alpha in (layer.alpha_cross_attn, layer.alpha_dense):
                nn.init.constant_(alpha, FIRST_GATE)
        self.embed_tokens = nn.Module()
        self.embed_tokens.additional_embedding = nn.Embedding(config.additional_vocab_size, width)

    @property
    def added(self) -> Any:
        """The embedding of the two tokens that IDEFICS adds."""
        return self.embed_tokens.additional_embedding

    @torch.no_grad()
    def fit(self, sample: torch.Tensor) -> None:
        """Let the resampler see channels of mean 0 and deviation 1: in the tower a few dominate."""
        block: Any
        for block in self.perceiver_resampler.blocks:
            attention = block[0]
            norm = attention.context_layer_norm
            normal = nn.functional.layer_norm(sample, norm.normalized_shape, eps=norm.eps)
            mean, std = normal.mean(0), normal.std(0).clamp_min(1e-3)
            norm.weight.copy_(1 / std)
            norm.bias.copy_(-mean / std)

    @torch.no_grad()
    def begin(self, frozen: Frozen, to_words: nn.Linear, features: torch.Tensor, text: str) -> None:
        """Let the gated layers start by adding what `to_words` [features -> width] tells of latents.

        Values are of deviation 1, and the output has the deviation that the hidden states of a
        `text` have at that layer. Norms and queries start as the language model's own there.
        """
        scale = to_words(self.perceiver_resampler(features.float())).std()
        ids = torch.tensor([frozen.encode(text)])
        language: Any = frozen.language
        states = language(inputs_embeds=frozen.embed(ids), output_hidden_states=True)
        gated: Any
        for number, gated in enumerate(self.gated_cross_attn_layers):
            here = number * self.interval
            layer = language.layers[here]
            deviation = states.hidden_states[here].float().std(-1).median()
            gated.cross_attn.v_proj.weight.copy_(to_words.weight / scale)
            gated.cross_attn.o_proj.weight.copy_(torch.eye(to_words.out_features) * deviation)
            gated.cross_attn.q_proj.weight.copy_(layer.self_attn.q_proj.weight)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                getattr(gated, norm).weight.copy_(getattr(layer, norm).weight)
        for number, word in enumerate(("\n", " image")):
            tokens = frozen.embed(torch.tensor(frozen.encode(word)))
            self.added.weight[number] = tokens.float().mean(0)

    def answer_logits(
        self, frozen: Frozen, packed: Packed, pictures: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [answers, vocab] at the places that predict an answer, and the right tokens [answers].

        `pictures` are each row's features [tokens, features], in the order of its text.
        """
        language: Any = frozen.language
        table = torch.cat([frozen.table, self.added.weight.to(frozen.table.dtype)])
        latents = self.perceiver_resampler(
            torch.stack([p for row in pictures for p in row]).float()
        )
        media = nn.utils.rnn.pad_sequence(
            latents.split([len(row) for row in pictures]), batch_first=True
        )  # [rows, pictures, latents, features]
        most, each = media.shape[1], media.shape[2]
        seen = seen_picture(packed.ids, self.first_added + 1)  # [rows, length]
        visible = (seen[..., None] == torch.arange(most)).repeat_interleave(each, -1)
        hidden = torch.full(visible.shape, torch.finfo(media.dtype).min)
        media_mask = hidden.masked_fill(visible, 0.0)[:, None]
        states = table[packed.ids]
        mask = packed.mask(states.dtype)
        rope = language.rotary_emb(states, packed.positions)
        for number, layer in enumerate(language.layers):
            if number % self.interval == 0:
                states = self.gated_cross_attn_layers[number // self.interval](
                    states.float(),
                    image_hidden_states=media.flatten(1, 2),
                    image_attention_mask=media_mask,
                    cross_attention_gate=(seen >= 0).float(),
                ).to(table.dtype)
            states = layer(states, attention_mask=mask, position_embeddings=rope)
        asked = packed.labels != IGNORE  # the head is costly: only where there is a label
        return language.norm(states[asked]) @ table.T, packed.labels[asked]
