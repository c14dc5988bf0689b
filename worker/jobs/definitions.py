"""What every figure of a report means: the name of a field, and its definition with the source of its formula.

`worker/jobs/report.py` has a field for each; a test holds the two together.
"""

from __future__ import annotations

from typing import Final

RETRIEVAL: Final = {
    "recall": "share of the queries whose top k targets hold a relevant one",
    "precision": "mean share of the top k targets that is relevant",
    "relevant: partner": "a target whose payload is the same, byte for byte, as that of the query's own partner: "
    "several samples may share a caption, and none of them is then a mistake",
    "relevant: label": "a target with the query's class label; used for modalities that no data set holds together, so "
    "that there is no partner to find. Queries whose label no target has are left out",
    "chance": "the same figure for scores that are all equal. Equal scores count as random order everywhere",
    "direct": "targets ranked by the model's critic: the cosine of the vectors, their inner product, or minus half "
    "their squared distance",
    "marginal": "targets ranked by log mean over the bridge bank of exp(f(source, b) + f(b, target)), with the trained "
    "scales and without each leg's own offset (Che & Eysenbach 2025, Lemma 1)",
    "effective_sample_size": "Kish's, of the marginal sum: median over the targets, then over the queries",
    "trusted_fraction": "share of the queries whose median effective sample size is at least 10; for the others trust "
    "the order of the targets and not the values",
    "bridge_size": "items of the bridge bank that the marginal sums over",
}
ZERO_SHOT: Final = {
    "zero-shot logit": "log prior + log mean over the label's prompts of exp(scale * critic) (Oko et al. 2025), with "
    "the scale that was trained; a bias adds the same to every label and cancels",
    "prior": "training: the label's share of the training samples, from which the prompts are drawn; uniform: prompts "
    "were given. Its logarithm is added to the logit: right unless the classes come otherwise in use",
    "accuracy": "share of the samples whose label has the largest logit",
    "top": "share of the samples whose label is among the k largest logits",
    "cross_entropy": "mean of -log p(label | sample), nats",
    "error": "one minus the accuracy",
    "num_prompts": "of a label, or of all labels together where no M is named",
}
PROMPT_CURVE: Final = {
    "points": "figures with M prompts per label, means over draws of prompts without replacement from those at hand; "
    "the standard error holds both the samples and the draws",
    "cross_entropy_fit": "a + b / M by least squares over M, from M = 5 on where three such M are left: a mean of M "
    "exponentials has a bias that falls as 1 / M (Oko et al. 2025, figure 5)",
    "error_fit": "the same of the error, which can be at its floor long before the cross-entropy is",
    "a": "the figure with endless prompts",
    "b": "what one over M adds",
    "r_squared": "share of the variance over M that the fit explains",
}
CERTIFICATE: Final = {
    "r": "the label counts as found among the r largest logits",
    "bound": "mean over the samples of log sum_k exp(logit_k - logit of the label), over log(1 + r). If the label is "
    "not among the r largest, r others are as large, and the sum is 1 + r or more: so the top-r error is never above "
    "it, on these very samples (Chen et al. 2024, corollary 5.1)",
    "shown": "the bound, or 1 where it is larger and says nothing",
}
CALIBRATION: Final = {
    "expected_calibration_error": "sum over the bins of their share of the samples times |accuracy - mean confidence|; "
    "confidence is the largest probability of a sample, bins are (lower, upper] of equal width (Naeini et al. 2015). "
    "Few samples per bin make it larger than it is",
    "reliability": "accuracy beside confidence, bin by bin",
    "confidence": "mean of the largest probability in the bin",
    "temperature": "T with the least cross-entropy of softmax(logit / T) on a random half of the samples "
    "(Guo et al. 2017): above 1 the model is too sure. Before and after are measured on the other half. Of margins: "
    "one over the logit scale",
    "temperature_at_limit": "the best T is beyond 1/1000 or 1000: as when no sample is wrong",
}
PROBE: Final = {
    "linear_probe": "multinomial logistic regression (scikit-learn, L2) of standardised frozen vectors: learned from "
    "the training split, measured on the samples of this evaluation",
    "inverse_penalty": "C of the regression: the one of 0.01, 0.1, 1, 10 that does best on a fifth of the training "
    "samples; the fit then takes all of them",
    "chance of the probe": "the accuracy of always naming the commonest label of the training split",
}
GEOMETRY: Final = {
    "alignment": "mean |z_a - z_b|^2 over partners, unit vectors (Wang & Isola 2020, alpha = 2): 0 where partners "
    "coincide, 2 for vectors at right angles",
    "uniformity": "log mean exp(-2 |z_i - z_j|^2) over different samples of a modality, unit vectors (Wang & Isola "
    "2020, t = 2): 0 where all are one point, -4 at the lowest limit of many dimensions",
    "gap": "the modality gap |mean z_a - mean z_b|, unit vectors (Liang et al. 2022), at most 2",
    "gap_by_chance": "what the gap would come to if it were chance alone: sqrt(sum of the variances of z_a - z_b, "
    "over n)",
    "separable": "share of unseen vectors whose modality a logistic regression tells: learned from half the samples, "
    "measured on the other half, at most 2,000 in all; 0.5 where it cannot",
}
MARGINS: Final = {
    "margins": "in units of the critic, without the scale, in batches of 64 drawn without replacement; negatives are "
    "the batch's samples of another label, or of other payloads on both sides where there are no labels (`classes`). A "
    "temperature changes no margin of vectors that are there, only that of training does",
    "hardest": "score of the partner less that of the highest-scoring negative",
    "mean_negative": "score of the partner less the mean score of the negatives. When the temperature of training "
    "falls, it can fall while the hardest margin rises",
    "positive_share": "share of the queries whose partner scores above every negative",
    "quantiles": "of the hardest margin",
    "histogram": "of the hardest margin: counts between edges",
    "positive_score": "mean score of partners",
    "scale": "the logit scale that was trained for the pair",
    "by_temperature": "the same vectors at other temperatures: mean cross-entropy and probability of the partner among "
    "itself and the batch's negatives; the lowest cross-entropy tells whether the trained temperature suits these data",
    "partner_probability": "mean probability of the partner among itself and the batch's negatives",
}
COMPLETENESS: Final = {
    "completeness": "(alpha, beta, gamma) of Chen et al. 2024, assumption 4.1, for the critic over `of_bound`; pairs "
    "(x, y), (x', y') of partners with different labels, at most 1,024 samples",
    "alpha": "share of such pairs in which s(x', y) or s(x, y') is not below s(x, y)",
    "beta": "mean variance of s(x, y) over the x with y's label, or over the y with x's, whichever is larger",
    "gammas": "by alpha: the margin that both s(x', y) and s(x, y') keep from s(x, y) in all pairs but that share",
    "alpha_by_gamma": "share of the pairs that do not keep a margin gamma",
    "of_bound": "the largest size of the score: 1 for the cosine, else the largest that was met",
}
COMPOSITION: Final = {
    "method": "what the rule of compose chooses for this pair over this bridge, from the effective sample size, the "
    "resultant and the rank correlation that stand here",
    "bridge_size of composition": "items of both banks, without those that stand for sources and targets",
    "rank_correlation": "Spearman's, of direct with marginal scores of a source's targets; median over the sources. "
    "From 0.95 on the two are one answer; fails below 0.8",
    "best_agreement": "share of the sources whose best target is the same by both",
    "end_offset_deviation": "standard deviation over items of the leg's end of log Z, Z = mean over bridge items of "
    "exp(scale * score), nats: 0 where scores are log-ratios (Che & Eysenbach 2025, A2). Passes below 0.3, fails from "
    "1 on; compose removes these offsets",
    "bridge_offset_deviation": "the same over bridge items, with the mean over items of the leg's end",
    "resultant": "length of the mean unit bridge vector (A3): comparing vectors ranks well below 0.25, badly above 0.3",
    "largest_axis": "d times the largest eigenvalue of T = mean u u^T: 1 where directions are even; doubtful above "
    "twice (1 + sqrt(d / n))^2, which chance makes of even ones",
    "rayleigh": "d n |mean u|^2, chi-squared with d degrees of freedom for an even sphere; with many items any bridge "
    "is proved uneven, so judge by the resultant",
    "rayleigh_p": "chance of as large a statistic on an even sphere",
    "bingham": "d (d + 2) n / 2 (tr T^2 - 1 / d), chi-squared with (d - 1)(d + 2) / 2 degrees of freedom for an even "
    "sphere: sees axes that Rayleigh's does not",
    "bingham_p": "chance of as large a statistic on an even sphere",
    "projection_distance": "largest Kolmogorov-Smirnov distance, over 32 random directions v, of (1 + u.v) / 2 from "
    "its law on an even sphere, Beta((d - 1) / 2, (d - 1) / 2)",
    "projection_p": "chance of as large a distance on an even sphere: 32 times that of one direction, at most 1",
    "log_potential": "log mean exp(-2 |u - u'|^2) of different bridge items (Wang & Isola 2020)",
    "log_potential_if_even": "the same for an even sphere of so many dimensions",
    "axis_mean": "largest |mean| of a coordinate over the root of the mean variance",
    "axis_variance": "least and largest variance of a coordinate",
    "axis_kurtosis": "least and largest excess kurtosis of a coordinate: 0 where normal",
    "excess_kurtosis": "mean excess kurtosis of the coordinates: passes up to 0.5 either way, fails above 2",
    "elongation": "largest over mean eigenvalue of the covariance: 1 where round; passes up to 2, fails above 8, times "
    "(1 + sqrt(d / n))^2",
    "num_ways": "samples, of different payloads, among which the partner is to be found; calibration error of "
    "softmax(scale * score): passes below 0.05, fails from 0.15 on",
    "conditional_information": "nats of I(source; target | bridge) that are seen (A1): the mean, on half the samples, "
    "of the log-ratio of a normal model that was fitted to the other half, of what a kernel ridge regression on the "
    "bridge leaves of both ends. 0 where nothing is found. Passes up to 0.05 or twice its error, fails above 0.5. "
    "Pairs alone cannot tell",
    "verdict": "passes, doubtful or fails, by the thresholds that stand with the figures",
}
ERRORS: Final = {
    "standard_error": "deviation of the samples' own figures over sqrt(n), for samples that are drawn independently; "
    "of margins: of the batches' own means. It is 0 where all samples agree; a share of n samples may then still be "
    "off by about 3 / n",
    "interval": "95 %: percentiles of the figure over samples drawn again with replacement",
    "left_out": "what was asked for, or could have been, and why it could not be measured",
}
DEFINITIONS: Final = {
    name: meaning
    for part in (
        RETRIEVAL,
        ZERO_SHOT,
        PROMPT_CURVE,
        CERTIFICATE,
        CALIBRATION,
        PROBE,
        GEOMETRY,
        MARGINS,
        COMPLETENESS,
        COMPOSITION,
        ERRORS,
    )
    for name, meaning in part.items()
}
