"""Which classes of transformers are language models, by their names: none that writes text is left out."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from mlflow_safelock.gate.source import LANGUAGE_MODEL_CLASSES

OF_ANOTHER_KIND = {
    *("BarkCausalModel", "BarkModel", "MoshiDepthDecoder", "SpeechT5ForSpeechToText"),
    *("SeamlessM4TForSpeechToSpeech", "SeamlessM4TForSpeechToText", "SeamlessM4TForTextToSpeech"),
    *("SeamlessM4TForTextToText", "SeamlessM4TModel"),
    *("SeamlessM4Tv2ForSpeechToSpeech", "SeamlessM4Tv2ForSpeechToText", "SeamlessM4Tv2ForTextToSpeech"),
    *("SeamlessM4Tv2ForTextToText", "SeamlessM4Tv2Model", "SpeechEncoderDecoderModel"),
    *("GraniteSpeech5ForCTC", "LasrForCTC", "ParakeetForCTC"),
    "ImageGPTForCausalImageModeling",
    *("BertGenerationDecoder", "EncoderDecoderModel", "MarianMTModel", "RagTokenForGeneration"),
    *("BlipForQuestionAnswering", "VisionEncoderDecoderModel"),
}
"""Speech and images, transcription, translation and captions: made of an encoder and a decoder each."""


def test_every_class_that_generates_is_a_language_model_or_known_as_another_kind() -> None:
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    declared = re.compile(r"^class (\w+)\([^)]*\bGenerationMixin\b", re.MULTILINE)
    generating = {name for file in files for name in declared.findall(file.read_text(encoding="utf-8"))}
    assert len(generating) > 300
    others = {name for name in generating if not name.endswith(LANGUAGE_MODEL_CLASSES)}
    assert others <= OF_ANOTHER_KIND


def test_every_auto_class_for_them_is_one() -> None:
    autos = {name for name in dir(transformers) if re.fullmatch(r"AutoModelFor\w*(Text|LM)", name)}
    assert {"AutoModelForCausalLM", "AutoModelForImageTextToText"} <= autos
    others = {name for name in autos if not name.endswith(LANGUAGE_MODEL_CLASSES)}
    assert others == {"AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"}
