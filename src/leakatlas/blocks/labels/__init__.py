"""Label recovery: which labels an update gives away, before any image is sought."""

from leakatlas.blocks.labels.counts import counts_from_bias as counts_from_bias
from leakatlas.blocks.labels.counts import counts_from_weight as counts_from_weight
from leakatlas.blocks.labels.counts import labels_from_counts as labels_from_counts
from leakatlas.blocks.labels.counts import mean_probability as mean_probability
from leakatlas.blocks.labels.counts import round_counts as round_counts
from leakatlas.blocks.labels.counts import uniform as uniform
from leakatlas.blocks.labels.counts import uniform_counts as uniform_counts
from leakatlas.blocks.labels.head import Head as Head
from leakatlas.blocks.labels.head import find_head as find_head
from leakatlas.blocks.labels.joint import joint_logits as joint_logits
from leakatlas.blocks.labels.joint import soft_cross_entropy as soft_cross_entropy
from leakatlas.blocks.labels.joint import soft_labels as soft_labels
from leakatlas.blocks.labels.signs import column_min as column_min
from leakatlas.blocks.labels.signs import column_min_set as column_min_set
from leakatlas.blocks.labels.signs import column_minima as column_minima
from leakatlas.blocks.labels.signs import idlg as idlg
from leakatlas.blocks.labels.signs import idlg_bias as idlg_bias
from leakatlas.blocks.labels.signs import idlg_paper as idlg_paper
from leakatlas.blocks.labels.signs import idlg_sum as idlg_sum
from leakatlas.blocks.labels.signs import sum_sign_set as sum_sign_set
