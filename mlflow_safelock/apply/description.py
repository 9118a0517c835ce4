"""What has to be said about an architecture before its attention heads can be locked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_PATH = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_0-9]+)*$"

ModulePath = Annotated[str, Field(pattern=_PATH, max_length=200)]
"""Names of nested modules, outermost first, joined by dots."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=100)]


class Architecture(BaseModel):
    """Where the heads of one architecture are: a row of the table, or a description that a user gives.

    Attributes:
        model_type: ``model_type`` of the configuration of the part that decodes text.
        layers: Path of the list of decoder layers, in a causal language model and in its checkpoint.
        output_projection: Path of the attention output projection inside a layer.
        layout: ``linear`` for a weight of shape ``[hidden, heads * head_dim]`` (``torch.nn.Linear``),
            ``conv1d`` for its transpose (``transformers.pytorch_utils.Conv1D``).
        output_bias: Whether the output projection of a stock model has a bias: ``always``, ``never``, or the
            name of the configuration flag that decides.
        biased_with_output: Paths inside a layer of the projections that get a bias, of zeros, when the
            output projection of a standalone checkpoint is given one.
        biased_where_present: The same for projections that only some models of the architecture have.
        config_names: What the configuration calls the number of layers, the number of query heads, the width
            of the residual stream, and the width of a head's output.
        default_head_dim: Head width where the configuration does not say it; ``None``: hidden / heads.
        bypassed_by: Configuration flag under which the model uses the projection's weight without calling
            the module, so that neither bias nor hook would have an effect; ``None`` where there is none.
        standalone: How a checkpoint that stock ``transformers`` loads carries the lock's biases:
            ``own_bias`` adds them to the biases that are there; ``flag`` does so, too, and where there are
            none sets the ``output_bias`` flag; ``rewritten`` writes the same model down as an architecture
            that has it; ``None`` where no exact way is known.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model_type: Name
    layers: ModulePath = "model.layers"
    output_projection: ModulePath = "self_attn.o_proj"
    layout: Literal["linear", "conv1d"] = "linear"
    output_bias: Name = "never"
    biased_with_output: tuple[ModulePath, ...] = ()
    biased_where_present: tuple[ModulePath, ...] = ()
    config_names: tuple[Name, Name, Name, Name] = (
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_size",
        "head_dim",
    )
    default_head_dim: Annotated[int, Field(gt=0)] | None = None
    bypassed_by: Name | None = None
    standalone: Literal["flag", "rewritten", "own_bias"] | None = None
