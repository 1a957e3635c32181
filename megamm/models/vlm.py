"""The two vision-language models: image features merged into the sequence, or attended to.

Shapes: B samples, S positions, N images, P features per image, H hidden size, W media width, L latents,
T images per sample (padded), M = T * L media tokens. Tensors of the decoder are sequence first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Optional

import torch
from torch import nn

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.engine.gradient_flow import GradientNeeds, GradientSources, cut
from megamm.engine.groups import Groups
from megamm.engine.transformer_config import decoder_config
from megamm.errors import InputError
from megamm.layers.context import context_slice
from megamm.layers.cross_attention import MediaMask
from megamm.layers.dealt_images import encode_dealt, share_gradients
from megamm.layers.decoder import Decoder
from megamm.layers.documents import Documents, documents, last_image
from megamm.layers.media_rows import num_rows, pack, unpack
from megamm.layers.media_segments import MediaSegments
from megamm.layers.module import MegatronModule
from megamm.layers.recompute import recomputed
from megamm.models.freezing import freeze, is_trained, train_new_tokens
from megamm.models.projector import MLPProjector
from megamm.models.qformer import QFormer
from megamm.models.resampler import PerceiverResampler
from megamm.models.vision.vit import VisionTransformer


class VisionLanguageModel(MegatronModule, ABC):
    """Vision encoder, connector and decoder of one pipeline chunk.

    Args:
        recipe: decides all sizes and the layout.
        groups: process groups.
        backend_name: "local" or "te".
        image_token_id: placeholder of an image in `Batch.input_ids`.
        pre_process, post_process: whether this chunk is the first, the last of the pipeline.
        vp_stage: index of the chunk under the interleaved schedule.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: Groups,
        backend_name: str,
        image_token_id: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
    ) -> None:
        super().__init__(decoder_config(recipe))
        self.model_config = recipe.model
        self.tp_group = groups.collection.tp
        self.pg_collection = groups.collection  # megatron's schedules look for it here
        self.backend_name = backend_name
        self.image_token_id = image_token_id
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        if pre_process and self.sees_images:
            self.vision = VisionTransformer(recipe.model.vision).to(self.config.params_dtype)
            self.connector = self.build_connector()
        self.language = Decoder(
            recipe.model.language, self.config, groups, backend_name, pre_process, post_process, vp_stage
        )
        # megatron's schedules and gradient reduction ask the outermost module for these
        self.model_type = self.language.model_type
        self.share_embeddings_and_output_weights = recipe.model.language.tie_embeddings
        self.recompute = recipe.training.recompute
        self.incoming = self.outgoing = GradientNeeds()
        freeze(self, recipe.training, recipe.model.language.tie_embeddings)
        if pre_process and self.sees_images:
            share_gradients(self.vision)

    sees_images = True  # has an encoder and a connector

    @abstractmethod
    def build_connector(self) -> nn.Module:
        """What turns vision features into what the decoder takes."""

    @abstractmethod
    def forward(self, batch: Batch, return_logits: bool = False) -> torch.Tensor:
        """Loss per position [B, S]; logits [B, S, V / tp] if asked for; hidden states on earlier stages."""

    @abstractmethod
    def pipeline_rows(self) -> int:
        """Positions that media add to the [S, B, H] tensor sent between pipeline stages."""

    @abstractmethod
    def gradient_sources(self) -> GradientSources:
        """What this chunk trains, seen from the boundary above it."""

    @abstractmethod
    def receive(self, received: torch.Tensor) -> torch.Tensor:
        """The hidden states in what the previous pipeline stage sent."""

    def connect(self, incoming: GradientNeeds, outgoing: GradientNeeds) -> None:
        """Take note of which gradients cross the boundaries below and above this chunk."""
        self.incoming, self.outgoing = incoming, outgoing

    def set_input_tensor(self, input_tensor: torch.Tensor | list[Optional[torch.Tensor]] | None) -> None:
        """Take what the previous pipeline stage sent (called by megatron's schedules)."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        cache = self.language.cache
        is_further = cache is not None and not cache.is_prompt  # then no media come along
        hidden = received if received is None or is_further else self.receive(received)
        self.language.decoder.set_input_tensor(hidden)

    def shared_embedding_or_output_weight(self) -> Optional[torch.Tensor]:
        """The weight that the first and the last pipeline stage share, if embeddings are tied."""
        return self.language.shared_embedding_or_output_weight()

    def encode_images(self, batch: Batch) -> torch.Tensor:
        """[N, P, vision width] features; at least one image is encoded so that every rank runs the same
        collectives and every trained parameter is in the graph, also for text-only batches."""
        size = self.model_config.vision.image_size
        images = batch.images if batch.num_images else batch.images.new_zeros(1, 3, size, size)
        encode = partial(self.vision, recompute=self.recompute.vision)
        with torch.set_grad_enabled(is_trained(self.vision) and torch.is_grad_enabled()):
            return encode_dealt(encode, images.to(self.config.params_dtype), self.tp_group)

    def connect_features(self, features: torch.Tensor) -> torch.Tensor:
        """What the connector makes of the [N, P, vision width] features."""
        if self.recompute.connector:
            return recomputed(self.connector, features)
        return self.connector(features)

    def check_images(self, batch: Batch, positions_per_image: int) -> torch.Tensor:
        """[B, S] bool of image positions, after making sure that they and the images agree."""
        is_image = batch.input_ids == self.image_token_id
        expected = batch.images_per_sample * positions_per_image
        found = is_image.sum(dim=1)
        if not torch.equal(found, expected):
            row = int((found != expected).nonzero()[0])
            raise InputError(
                f"sample {int(batch.sample_ids[row])}: {int(found[row])} image positions in the sequence, "
                f"but {int(batch.images_per_sample[row])} images of {positions_per_image} positions each; "
                "give as many images as placeholders (an image span may have been cut)"
            )
        if self.pre_process and batch.num_images != int(batch.images_per_sample.sum()):
            raise InputError(
                f"{batch.num_images} images were given for {int(batch.images_per_sample.sum())} placeholders"
            )
        return is_image

    def _run_decoder(
        self,
        batch: Batch,
        embeddings: Optional[torch.Tensor],
        return_logits: bool,
        **block_kwargs: Any,
    ) -> torch.Tensor:
        self.language.begin(batch)
        return self.language(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,  # causal; padding comes last and carries no loss
            decoder_input=embeddings,
            labels=None if return_logits else self.own_labels(batch),
            packed_seq_params=self._documents(batch),
            extra_block_kwargs=block_kwargs,
        )

    def decode_next(self, input_ids: torch.Tensor) -> torch.Tensor:
        """One further token of each row, within `language.caching`.

        Args:
            input_ids: [B], not of images.
        Returns:
            [B, 1, V / tp] logits; [1, B, H] hidden states on earlier stages.
        """
        cache = self.language.cache
        assert cache is not None and not cache.is_prompt
        if self.pre_process:
            return self.language.decode_next(self.language.embed(input_ids[:, None], cache.lengths[:, None]))
        return self.language.decode_next(self.language.decoder.input_tensor)

    def own_labels(self, batch: Batch) -> torch.Tensor:
        """[B, S / C] labels of this rank's part of the sequence under context parallelism."""
        return context_slice(batch.labels, 1, self.pg_collection.cp)

    def _documents(self, batch: Batch) -> Optional[Documents]:
        if not batch.packed:
            return None
        return documents(batch.document_lengths(), batch.input_ids.device, self.language.packs_thd)


class MergedModel(VisionLanguageModel):
    """Image features (LLaVA, Liu et al. 2023) or what a Q-Former makes of them (BLIP-2, Li et al. 2023) take
    the place of their placeholders in the sequence."""

    def build_connector(self) -> nn.Module:
        model = self.model_config
        width, hidden = model.vision.width, model.language.hidden_size
        if model.connector.kind == "qformer":
            return QFormer(self.config, model.connector, width, hidden, self.backend_name, self.tp_group)
        projector = MLPProjector(width, hidden)
        return projector.to(self.config.params_dtype)

    def receive(self, received: torch.Tensor) -> torch.Tensor:
        return cut(received, self.incoming.hidden)

    def gradient_sources(self) -> GradientSources:
        return GradientSources(hidden=is_trained(self), media=False, mixes_media=False)

    def forward(self, batch: Batch, return_logits: bool = False) -> torch.Tensor:
        # 1. placeholders and images must agree
        is_image = self.check_images(batch, self.model_config.tokens_per_image)
        embeddings = None
        if self.pre_process:
            # 2. encode the images and bring them to the width of the decoder: [N, P or L, H]
            image_embeddings = self.connect_features(self.encode_images(batch))[: batch.num_images]
            # 3. embed the tokens: [S, B, H]
            embeddings = self.language.embed(batch.input_ids, batch.position_ids)
            # 4. put the image embeddings where their placeholders are (sample by sample, left to right)
            merged = embeddings.transpose(0, 1).masked_scatter(is_image[..., None], image_embeddings)
            own = context_slice(merged.transpose(0, 1), 0, self.pg_collection.cp)
            embeddings = self.language.scatter(own.contiguous())
        # 5. decode; the last stage returns the loss per position
        return self._run_decoder(batch, embeddings, return_logits)

    def pipeline_rows(self) -> int:
        return 0


class LanguageModel(MergedModel):
    """The decoder alone, as it was imported: text only."""

    sees_images = False

    def forward(self, batch: Batch, return_logits: bool = False) -> torch.Tensor:
        if batch.num_images:
            raise InputError(f"{batch.num_images} images were given to a language model, which sees none")
        embeddings = None
        if self.pre_process:
            embedded = self.language.embed(batch.input_ids, batch.position_ids)
            embeddings = self.language.scatter(context_slice(embedded, 0, self.pg_collection.cp))
        return self._run_decoder(batch, embeddings, return_logits)


class CrossAttentionModel(VisionLanguageModel):
    """The decoder attends to resampled image features through gated blocks (Flamingo, Alayrac et al. 2022).

    A text position attends to the media tokens of the latest image before it:

        text      a  <1>  b   c  <2>  d
        image 1   .   x   x   x   .   .
        image 2   .   .   .   .   x   x
    """

    _media: Optional[torch.Tensor] = None  # [M, B, W], received from the previous pipeline stage

    def __init__(self, recipe: Recipe, *args: object, **kwargs: object) -> None:
        super().__init__(recipe, *args, **kwargs)  # type: ignore[arg-type]
        # between stages the shape must be the same for every micro-batch
        rows = recipe.training.micro_batch_size if recipe.data.pack else 1  # what a packed row may hold
        most = max(1, recipe.data.max_images * rows)  # one place where none is allowed, as without stages
        self.fixed_num_images = most if recipe.parallel.pipeline > 1 else None

    def build_connector(self) -> nn.Module:
        model = self.model_config
        return PerceiverResampler(
            self.config, model.connector, model.vision.width, self.backend_name, self.tp_group
        )

    def forward(self, batch: Batch, return_logits: bool = False) -> torch.Tensor:
        # 1. placeholders and images must agree
        is_image = self.check_images(batch, positions_per_image=1)
        embeddings = None
        if self.pre_process:
            # 2. encode the images and resample each to a few latents: [N, L, W]
            latents = self.connect_features(self.encode_images(batch))[: batch.num_images]
            # 3. lay them out by sample: [M, B, W]
            media = self.language.scatter(self._by_sample(latents, batch))
            # 4. embed the tokens: [S, B, H]
            embedded = self.language.embed(batch.input_ids, batch.position_ids)
            embeddings = self.language.scatter(context_slice(embedded, 0, self.pg_collection.cp))
        else:
            assert self._media is not None, "set_input_tensor must come before forward on later stages"
            media = self._media
        # 5. decode; layers with a gated block attend to the media that the mask allows
        mask = self._media_mask(is_image, batch)
        out = self._run_decoder(batch, embeddings, return_logits, context=media, context_mask=mask)
        # 6. later stages need the media too
        return out if self.post_process else pack(out, media)

    def _images_per_sample(self, batch: Batch) -> int:
        """T: images that every sample is padded to."""
        return self.fixed_num_images or max(1, int(batch.images_per_sample.max()))

    def _by_sample(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, L, W] latents to [T * L, B, W], empty places zero."""
        num_samples, per_sample = batch.input_ids.shape[0], self._images_per_sample(batch)
        sample = torch.repeat_interleave(batch.images_per_sample)  # [N]: whose image
        first = batch.images_per_sample.cumsum(0) - batch.images_per_sample
        slot = sample * per_sample + torch.arange(len(sample), device=sample.device) - first[sample]
        media = latents.new_zeros(num_samples * per_sample, *latents.shape[1:])
        media = media.index_copy(0, slot, latents)
        return media.view(num_samples, -1, latents.shape[-1]).transpose(0, 1).contiguous()

    def _media_mask(self, is_image: torch.Tensor, batch: Batch) -> MediaMask:
        """Who attends to which media token, for this rank's part of the sequence."""
        image, has_image = last_image(is_image, batch.position_ids)
        own_image = context_slice(image, 1, self.pg_collection.cp)
        num_latents = self.model_config.connector.num_latents
        segments = MediaSegments.of(own_image, self._images_per_sample(batch), num_latents)
        if not self.model_config.cross_attention.skip_text_only:
            return MediaMask(segments)
        own_part = context_slice(has_image, 1, self.pg_collection.cp).t()[..., None]
        # (float on the way: bools are not scattered)
        return MediaMask(segments, self.language.scatter(own_part.float()) > 0)

    def pipeline_rows(self) -> int:
        """Counted in positions of the whole sequence, of which each rank packs its share: under sequence
        parallelism its shard of the media, under context parallelism all of them."""
        model = self.model_config
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        shards *= self.config.context_parallel_size
        return num_rows(self._local_media(), model.vision.width, model.language.hidden_size) * shards

    def _local_media(self) -> int:
        """Media tokens that this rank holds per sample, for the fixed number of images."""
        assert self.fixed_num_images is not None
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return self.fixed_num_images * self.model_config.connector.num_latents // shards

    def receive(self, received: torch.Tensor) -> torch.Tensor:
        # before the decoder sees it: rotary embeddings take their length from this tensor
        hidden, media = unpack(received, self._local_media(), self.model_config.vision.width)
        self._media = cut(media, self.incoming.media)
        return cut(hidden, self.incoming.hidden)

    def gradient_sources(self) -> GradientSources:
        has_images = self.pre_process
        return GradientSources(
            hidden=is_trained(self.language),
            media=has_images and (is_trained(self.vision) or is_trained(self.connector)),
            mixes_media=any(
                layer.gated_cross_attention is not None for layer in self.language.decoder.layers
            ),
        )


def build_model(recipe: Recipe, groups: Groups, backend_name: str, image_token_id: int) -> list[nn.Module]:
    """This rank's chunks of the recipe's model (one, unless the interleaved schedule is used), with
    uninitialised weights, on the rank's device.

    Raises:
        InputError: the recipe is of an encoder alone.
    """
    if recipe.model.assembly == "vision":
        raise InputError("model.assembly: an encoder alone has no logits; import it together with a decoder")
    classes = {"merged": MergedModel, "cross_attention": CrossAttentionModel, "language": LanguageModel}
    model_class = classes[recipe.model.assembly]
    num_chunks = recipe.parallel.virtual_pipeline or 1
    chunks = []
    for chunk in range(num_chunks):
        first = groups.is_first_stage and chunk == 0
        last = groups.is_last_stage and chunk == num_chunks - 1
        vp_stage = chunk if num_chunks > 1 else None
        model = model_class(recipe, groups, backend_name, image_token_id, first, last, vp_stage)
        chunks.append(model.to(groups.device))
        if recipe.training.unfreeze.new_tokens:
            train_new_tokens(chunks[-1])
    return chunks
