"""Which neurons to keep: pure functions of tensors and numbers.

statistic.py          GRIFFIN's statistic of a prompt, and other sums over tokens
selection.py          a statistic -> the neurons to keep
fold.py               the kept columns of down take over what the dropped neurons gave
prior.py              scores of other texts, in a file
shipped_text.py       the text that priors and calibrations are measured on
layer_allocation.py   one sparsity shared over the layers by measured curves
fidelity.py           figures of how close two models' predictions are
ffn_skip.py           FFN-SkipLLM: which feed-forward blocks are skipped
calibration.py        what a static choice of neurons is made from
calibration_texts.py  calibration files -> token ids of samples
"""
