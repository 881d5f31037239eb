"""InstructBLIP (Dai et al. 2023, arXiv 2305.06500): BLIP-2 whose Q-Former reads the instruction too, with
Vicuna or Flan-T5.

Reference: transformers' InstructBlipForConditionalGeneration and InstructBlipProcessor.
"""

from __future__ import annotations

from vlm_edge.errors import CheckpointMissing
from vlm_edge.export.archs import blip2
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.model import Model
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.runtime.manifest import CacheDtype, InstructionSettings

MODEL_TYPES = ("instructblip",)
RENAMES = blip2.RENAMES
INNER_GENERATION = blip2.INNER_GENERATION
TOKENIZER = "qformer_tokenizer.json"


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """The checkpoint as vision, connector and llm; with Flan-T5 llm_encoder before llm.

    Args:
        cache_dtype: of the language model's keys and values.

    Raises:
        CheckpointError: config.json, the processor, a tokenizer or a tensor is not what InstructBLIP needs.
    """
    if prompt.instruction_tokenizer_json is None:
        why = "qformer_tokenizer/tokenizer.json is missing; download the whole checkpoint"
        raise CheckpointMissing(checkpoint.folder, why)
    qformer = checkpoint.config.sub("qformer_config")
    instruction = InstructionSettings(TOKENIZER, qformer.size("max_position_embeddings", 512))
    return blip2.assemble("instructblip", instruction, checkpoint, processor, prompt, cache_dtype)
