"""A classifier that transformers has no class for: a decoder's body, perhaps without its final norm, and a head.

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

Needs torch and transformers alone.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class W2SGClassifierConfig(PretrainedConfig):
    """The configuration.

    Args:
        backbone: of the body, as its own config.json has it.
        final_norm: whether the head reads states after the body's final norm, or those of its last block.
        experts: 0 for one linear head; else K heads, whose probabilities are mixed by fixed weights.
    """

    model_type = "w2sg_classifier"

    def __init__(self, backbone=None, final_norm=True, experts=0, **kwargs):
        self.backbone, self.final_norm, self.experts = backbone, final_norm, experts
        super().__init__(**kwargs)

    def body(self):
        """The body's own configuration."""
        values = dict(self.backbone)
        return AutoConfig.for_model(values.pop("model_type"), **values)


class W2SGClassifier(PreTrainedModel):
    """The head reads the state of each text's last token, known by the attention mask.

    ``logits`` are [B, num_labels]. With experts and one reward a text (num_labels = K) they are the rewards of the
    experts, and `compare` gives a pair's log-probabilities; with experts and classes they are log-probabilities.
    """

    config_class = W2SGClassifierConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        body = config.body()
        self.backbone = AutoModel.from_config(body, attn_implementation=config._attn_implementation)
        self.score = nn.Linear(body.hidden_size, config.num_labels * max(1, self._experts_of_classes), bias=True)
        if config.experts:
            self.weights = nn.Parameter(torch.zeros(config.experts))
        self.post_init()

    @property
    def _experts_of_classes(self):
        return 0 if self.config.problem_type == "regression" else self.config.experts

    def _init_weights(self, module):
        pass

    def _blocks(self):
        depth = self.backbone.config.num_hidden_layers
        return next(m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        caught = []
        if not self.config.final_norm:
            last = self._blocks()[-1]
            handle = last.register_forward_hook(lambda _, __, output: caught.append(output))
        try:
            states = self.backbone(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        finally:
            if not self.config.final_norm:
                handle.remove()
        if caught:
            states = caught[0][0] if isinstance(caught[0], (tuple, list)) else caught[0]
        places = torch.arange(input_ids.shape[1], device=states.device)
        ends = (places * attention_mask.to(states.device)).argmax(-1)
        pooled = states[torch.arange(len(states), device=states.device), ends]
        logits = self.score(pooled.to(self.score.weight.dtype)).float()
        if self._experts_of_classes:
            experts = logits.unflatten(-1, (self.config.experts, self.config.num_labels)).log_softmax(-1)
            logits = (experts + self.weights.float().log_softmax(0)[:, None]).logsumexp(1)
        return SequenceClassifierOutput(logits=logits)

    def compare(self, first, second):
        """Log-probabilities [B, 2] that the first or the second text of a pair is better, of `forward`'s logits."""
        rewards = torch.stack([first, second], -1).log_softmax(-1)  # [B, K, 2]
        if not self.config.experts:
            return rewards[:, 0]
        return (rewards + self.weights.float().log_softmax(0)[:, None]).logsumexp(1)
