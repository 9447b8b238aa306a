"""Label recovery: which labels an update gives away, before any image is sought.

One identity stands behind every counting rule (:mod:`~leakatlas.blocks.labels.counts`); sign rules
(:mod:`~leakatlas.blocks.labels.signs`) and the rank rule (:mod:`~leakatlas.blocks.labels.rank`)
need no estimate at all. Where the head's own gradient is withheld, a bridge from the layer below
(:mod:`~leakatlas.blocks.labels.bridge`) still leads to the counts. :data:`METHODS` lists every
rule with its output and its requirements.
"""

from leakatlas.blocks.labels.bridge import Bridge as Bridge
from leakatlas.blocks.labels.bridge import bridge_layer as bridge_layer
from leakatlas.blocks.labels.bridge import build_bridge as build_bridge
from leakatlas.blocks.labels.bridge import gdbr as gdbr
from leakatlas.blocks.labels.bridge import logit_gradient as logit_gradient
from leakatlas.blocks.labels.bridge import output_gradient as output_gradient
from leakatlas.blocks.labels.counts import counts_from_bias as counts_from_bias
from leakatlas.blocks.labels.counts import counts_from_weight as counts_from_weight
from leakatlas.blocks.labels.counts import labels_from_counts as labels_from_counts
from leakatlas.blocks.labels.counts import mean_probability as mean_probability
from leakatlas.blocks.labels.counts import round_counts as round_counts
from leakatlas.blocks.labels.counts import uniform as uniform
from leakatlas.blocks.labels.counts import uniform_counts as uniform_counts
from leakatlas.blocks.labels.equations import FixedPoint as FixedPoint
from leakatlas.blocks.labels.equations import class_embeddings as class_embeddings
from leakatlas.blocks.labels.equations import fixed_point as fixed_point
from leakatlas.blocks.labels.equations import ilrg as ilrg
from leakatlas.blocks.labels.equations import rlu as rlu
from leakatlas.blocks.labels.equations import simulated_passes as simulated_passes
from leakatlas.blocks.labels.equations import solve_counts as solve_counts
from leakatlas.blocks.labels.estimates import dimitrov as dimitrov
from leakatlas.blocks.labels.estimates import dimitrov_bias as dimitrov_bias
from leakatlas.blocks.labels.estimates import zlg as zlg
from leakatlas.blocks.labels.estimates import zlg_bias as zlg_bias
from leakatlas.blocks.labels.greedy import bias_corrected as bias_corrected
from leakatlas.blocks.labels.greedy import e2egi as e2egi
from leakatlas.blocks.labels.greedy import llg as llg
from leakatlas.blocks.labels.greedy import llg_white_box as llg_white_box
from leakatlas.blocks.labels.greedy import remove_greedily as remove_greedily
from leakatlas.blocks.labels.head import Head as Head
from leakatlas.blocks.labels.head import find_head as find_head
from leakatlas.blocks.labels.joint import joint_logits as joint_logits
from leakatlas.blocks.labels.joint import soft_cross_entropy as soft_cross_entropy
from leakatlas.blocks.labels.joint import soft_labels as soft_labels
from leakatlas.blocks.labels.methods import METHODS as METHODS
from leakatlas.blocks.labels.methods import Evidence as Evidence
from leakatlas.blocks.labels.methods import Method as Method
from leakatlas.blocks.labels.methods import recover as recover
from leakatlas.blocks.labels.moments import HeadPass as HeadPass
from leakatlas.blocks.labels.moments import class_row_sums as class_row_sums
from leakatlas.blocks.labels.moments import confusion as confusion
from leakatlas.blocks.labels.moments import head_pass as head_pass
from leakatlas.blocks.labels.moments import mean_feature_sum as mean_feature_sum
from leakatlas.blocks.labels.outputs import Counts as Counts
from leakatlas.blocks.labels.outputs import LabelSet as LabelSet
from leakatlas.blocks.labels.outputs import Multiset as Multiset
from leakatlas.blocks.labels.outputs import Order as Order
from leakatlas.blocks.labels.outputs import Recovered as Recovered
from leakatlas.blocks.labels.outputs import Soft as Soft
from leakatlas.blocks.labels.outputs import as_counts as as_counts
from leakatlas.blocks.labels.outputs import as_multiset as as_multiset
from leakatlas.blocks.labels.profiles import Profile as Profile
from leakatlas.blocks.labels.profiles import hf_gradinv as hf_gradinv
from leakatlas.blocks.labels.profiles import reference_profile as reference_profile
from leakatlas.blocks.labels.protocol import clip_scale as clip_scale
from leakatlas.blocks.labels.protocol import effective_steps as effective_steps
from leakatlas.blocks.labels.protocol import mean_from_delta as mean_from_delta
from leakatlas.blocks.labels.protocol import mean_from_sum as mean_from_sum
from leakatlas.blocks.labels.protocol import scaled as scaled
from leakatlas.blocks.labels.protocol import without_weight_decay as without_weight_decay
from leakatlas.blocks.labels.rank import RankedSet as RankedSet
from leakatlas.blocks.labels.rank import rlg as rlg
from leakatlas.blocks.labels.requirements import Requirement as Requirement
from leakatlas.blocks.labels.requirements import knowledge_for as knowledge_for
from leakatlas.blocks.labels.requirements import minimal_letters as minimal_letters
from leakatlas.blocks.labels.signs import column_min as column_min
from leakatlas.blocks.labels.signs import column_min_set as column_min_set
from leakatlas.blocks.labels.signs import column_minima as column_minima
from leakatlas.blocks.labels.signs import idlg as idlg
from leakatlas.blocks.labels.signs import idlg_bias as idlg_bias
from leakatlas.blocks.labels.signs import idlg_paper as idlg_paper
from leakatlas.blocks.labels.signs import idlg_sum as idlg_sum
from leakatlas.blocks.labels.signs import sum_sign_set as sum_sign_set
from leakatlas.blocks.labels.single import fc_features as fc_features
from leakatlas.blocks.labels.single import fc_soft_label as fc_soft_label
from leakatlas.blocks.labels.single import rgap_label as rgap_label
from leakatlas.blocks.labels.single import rgap_margins as rgap_margins
from leakatlas.blocks.labels.single import rgap_product as rgap_product
from leakatlas.blocks.labels.single import soft_label_without_bias as soft_label_without_bias
