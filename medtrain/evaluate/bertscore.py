"""BERTScore F1 from a local encoder (Zhang et al. 2020, https://arxiv.org/abs/1904.09675).

texts → token vectors of one hidden layer → every token matched with its most similar one on the
other side → precision over the answer, recall over the reference, F1; no idf, no rescaling.

Computed here because bert-score 0.3.13 fails with transformers 5 on empty texts and on tokenizers
without a length limit. Where it works the numbers are the same: [CLS] and [SEP] carry no weight but
may be matched, and an empty text scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from medtrain.errors import ConfigError, DataError
from medtrain.evaluate.metrics import Measured

_RECOMMENDED_LAYER = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilbert-base-uncased": 5,
    "distilroberta-base": 5,
    "scibert_scivocab_uncased": 8,
    "scibert_scivocab_cased": 9,
    "deberta-base": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "deberta-v3-base": 9,
    "deberta-v3-large": 12,
}
"""bert-score's table for encoders in wide use, by directory name: what agreed best with people."""

_DEFAULT_MAX_TOKENS = 512
_BATCH_SIZE = 32


class _Encoded(NamedTuple):
    vectors: Any
    """(tokens, hidden), each of length 1."""
    weights: Any
    """(tokens,); they sum to 1, or are all 0 for an empty text."""


class BertScore:
    """A TextMetric: `BertScore(directory)(answers, references)`.

    Raises:
        DataError: the directory holds no encoder with a tokenizer.
        ConfigError: the encoder has no such layer.
    """

    def __init__(self, directory: str, layer: int | None = None) -> None:
        self._name = Path(directory).name
        self._tokenizer, self._model = _load(directory)
        last = _number_of_layers(self._model.config)
        self.layer = layer or min(_RECOMMENDED_LAYER.get(self._name, last), last)
        if self.layer > last:
            raise ConfigError(
                f"evaluate.bertscore_layer is {layer}, but {directory} has {last} layers",
                fix=f"Set it to 1 to {last}, or leave it out.",
            )
        self._max_tokens = _max_tokens(self._tokenizer, self._model.config)

    def __call__(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Measured]:
        """Mean F1, and every row's."""
        by_length = sorted(range(len(answers)), key=lambda i: (len(answers[i]), i))
        rows = [0.0] * len(answers)
        for start in range(0, len(by_length), _BATCH_SIZE):
            batch = by_length[start : start + _BATCH_SIZE]
            encoded_answers = self._encode([answers[i] for i in batch])
            encoded_references = self._encode([references[i] for i in batch])
            for i, answer, reference in zip(
                batch, encoded_answers, encoded_references, strict=True
            ):
                rows[i] = _f1(answer, reference)
        note = f"F1, {self._name} layer {self.layer}, no idf, first {self._max_tokens} tokens"
        return {"bertscore_f1": Measured(fmean(rows), rows, note)}

    def _encode(self, texts: Sequence[str]) -> list[_Encoded]:
        import torch

        inputs = self._tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        special = inputs.pop("special_tokens_mask").bool()
        present = inputs["attention_mask"].bool()
        with torch.inference_mode():
            output = self._model(**inputs.to(self._model.device), output_hidden_states=True)
        hidden = output.hidden_states[self.layer]  # (batch, tokens, hidden)
        vectors = torch.nn.functional.normalize(hidden.float().cpu(), dim=-1)
        weights = (present & ~special).float()  # (batch, tokens)
        weights /= weights.sum(dim=1, keepdim=True).clamp(min=1)
        return [
            _Encoded(v[kept], w[kept]) for v, w, kept in zip(vectors, weights, present, strict=True)
        ]


def _f1(answer: _Encoded, reference: _Encoded) -> float:
    if not answer.weights.any() or not reference.weights.any():
        return 0.0
    similarity = answer.vectors @ reference.vectors.T  # (answer tokens, reference tokens)
    precision = float((similarity.max(dim=1).values * answer.weights).sum())
    recall = float((similarity.max(dim=0).values * reference.weights).sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def require_encoder(directory: str) -> None:
    """See that there is a directory, before hours of work end at its absence.

    Raises:
        DataError: there is none.
    """
    if not Path(directory).is_dir():
        raise DataError(
            f"The BERTScore encoder {directory} is not a directory",
            fix="Download one and set evaluate.bertscore_model to it, or leave it out.",
        )


def _load(directory: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from medtrain.attention.kernels import leave_cudnn_out

    require_encoder(directory)
    leave_cudnn_out()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} cannot be loaded as a BERTScore encoder: {error}",
            fix="It must be a directory that transformers saved, with tokenizer and safetensors.",
        ) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return tokenizer, _placed(model.eval())


def _placed(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _number_of_layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", None) or config.num_layers)


def _max_tokens(tokenizer: Any, config: Any) -> int:
    """The encoder's own limit; tokenizers without one claim 10^30."""
    positions = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_TOKENS
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        # Their positions start after the padding id.
        positions -= (config.pad_token_id or 0) + 1
    return int(min(tokenizer.model_max_length, positions))
