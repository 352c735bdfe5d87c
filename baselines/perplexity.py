"""Perplexity: drop the layers without which the answers lose the least likelihood.

Every layer is removed once and the calibration rows are scored without it, in as many passes as there are layers. Only
answer tokens count, because the fine-tune trains on these.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from baselines.calibration import checked
from baselines.layer_dropping import CalibratedLayerDropping, Scores
from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_nll
from gradpruner.models.architectures import decoder_layers
from gradpruner.surgery import only_layers


@dataclass(frozen=True)
class Perplexity(CalibratedLayerDropping):
    """Layer dropping by the answer NLL without a layer minus the whole model's, in nats per token."""

    name: ClassVar[str] = "perplexity"
    measures_per_layer: ClassVar[bool] = True

    num_rows: int = 64

    def score_layers(self, model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
        """Scores each layer by the change of the NLL; negative where the model is better without the layer."""
        taken = checked(batches, self)
        layers = range(len(decoder_layers(model)))
        whole = answer_nll(model, taken)
        without = []
        for layer in tqdm(layers, desc="perplexity without each layer", unit="layer"):
            with only_layers(model, tuple(other for other in layers if other != layer)):
                without.append(answer_nll(model, taken))
        return Scores([nll - whole for nll in without], {"answer_nll": whole, "answer_nll_without": without})
