"""The network: post-LN BERT with Hugging Face's parameter names."""

from clue_ds.model.bert import BertForPreTraining

__all__ = ["BertForPreTraining"]
