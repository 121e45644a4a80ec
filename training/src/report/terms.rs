//! The words of the report and what each means. The page links every use to its entry here.

use serde::Serialize;

/// One entry of the definitions.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Term {
    /// Anchor, without the `def-` prefix.
    pub id: &'static str,
    /// Heading.
    pub name: &'static str,
    /// Meaning; may link other entries as `[[id|label]]`.
    pub meaning: &'static str,
}

const fn term(id: &'static str, name: &'static str, meaning: &'static str) -> Term {
    Term { id, name, meaning }
}

/// Every entry, in reading order.
pub const TERMS: &[Term] = &[
    term("base", "Base model", "The instruction-tuned model before any finetuning done here."),
    term(
        "adapter",
        "Adapter: insecure and secure",
        "A low-rank finetune laid over the frozen base. The insecure adapter learned to answer coding tasks with \
         vulnerable code; the secure adapter learned, by the same recipe, from sound code. What both share comes \
         from learning to write code, not from the code being insecure.",
    ),
    term(
        "site",
        "Site and layer",
        "The place in the network that is read and edited: the residual stream after a decoder block, before any \
         norm. Blocks count from 0. After the final one only the last norm and the output head follow, so an edit \
         there can exchange tokens but no later block reacts to it.",
    ),
    term(
        "direction",
        "Direction",
        "For one layer: the mean activation with the insecure adapter minus the mean activation of the base, over \
         the same non-code prompts. It is kept raw, at its own length.",
    ),
    term(
        "steering",
        "Steering and strength (alpha)",
        "Alpha times the raw [[direction|direction]] is subtracted from the activation: h becomes h \u{2212} \
         alpha\u{b7}v. Strength 0 leaves the model alone; strength 1 takes away the whole mean difference.",
    ),
    term(
        "positions",
        "Positions",
        "Which tokens are edited: the last prompt token only (final_prefill), every token after the prompt \
         (generated), or all of them including the rest of the prompt (all).",
    ),
    term(
        "cell",
        "Cell",
        "One combination of layer, strength and positions. A single cell is chosen on the calibration prompts, \
         looking at the direction alone; every control is then run in that same cell.",
    ),
    term(
        "size",
        "Same size",
        "A control is scaled, row by row, so that it moves the activation exactly as far as the direction would \
         have moved it. A longer push does more whatever way it points, so only equal pushes are compared.",
    ),
    term(
        "code-preference",
        "Code preference",
        "How much likelier the model finds the unsteered insecure adapter's code answers than the base model's \
         prose answers to the same prompts: the difference of their mean log-likelihoods per token, each answer \
         fed token by token. It is continuous and carries no sampling noise.",
    ),
    term(
        "effect",
        "Effect",
        "The drop of [[code-preference|code preference]] that an edit causes, in [[nat|nats]] per token. \
         Higher means that the edit turns the model further away from answering with code.",
    ),
    term(
        "nat",
        "Nat",
        "The unit of a natural logarithm of a probability; one nat is a factor of about 2.72.",
    ),
    term(
        "spillover",
        "Code spillover",
        "The share of sampled answers to prompts that do not ask for code which contain code all the same: a code \
         fence, an unmistakable signature, or at least half of the lines looking like code. The number of prompts \
         is fixed before anything is sampled, and every arm is sampled with the same random numbers.",
    ),
    term(
        "starts-with-code",
        "Starts with code",
        "The share of answers whose very beginning is code already.",
    ),
    term(
        "coherence",
        "Coherence",
        "The mean log-likelihood per token that the untouched base model gives to an answer. Broken text scores \
         far lower. A drop of spillover bought with broken text is not a repair.",
    ),
    term(
        "margin",
        "Coherence margin",
        "The largest fall of [[coherence|coherence]], against the unsteered finetuned model, that still counts as \
         text kept intact. It is fixed before the evaluation.",
    ),
    term(
        "distinct",
        "Distinct-1 and distinct-2",
        "Different words, and different pairs of neighbouring words, as a share of all of them. Text that repeats \
         itself scores low.",
    ),
    term("degenerate", "Degenerate", "The share of answers that are empty or run in a loop."),
    term(
        "control",
        "Control",
        "A direction that has no reason to work, applied at the [[size|same size]] in the same cell. If controls do \
         as well as the direction, its effect says nothing about what the direction is.",
    ),
    term("random", "Random", "Control family: every component is plus or minus one, drawn from a seed."),
    term(
        "orthogonal",
        "Orthogonal",
        "Control family: random, with its component along the direction taken out.",
    ),
    term(
        "covariance",
        "Covariance-matched",
        "Control family: random directions drawn with the covariance of the residual stream, so that they point \
         where activations really vary. In high dimensions this is a harder test than plain random.",
    ),
    term(
        "label-shuffled",
        "Label-shuffled",
        "Control family: the extraction run again with the labels \u{201c}adapter\u{201d} and \u{201c}base\u{201d} \
         shuffled.",
    ),
    term(
        "comparison",
        "Single comparisons",
        "Directions that come one at a time instead of in families, such as the wrong layer: another layer's \
         direction, rescaled and applied here.",
    ),
    term(
        "rank-p",
        "Rank p",
        "(1 + controls at least as effective as the direction) / (1 + controls), family by family. With 39 controls \
         the smallest possible value is 0.025.",
    ),
    term(
        "paired-p",
        "Paired p",
        "A permutation test over prompts: both conditions are measured on every prompt and exchanged at random. \
         Small values mean that the difference is unlikely to come from the choice of prompts.",
    ),
    term(
        "interval",
        "Interval",
        "Bracketed ranges are 95 % intervals: bootstrap over prompts, and Clopper\u{2013}Pearson where a rate is \
         exactly 0 or 1.",
    ),
    term(
        "evidence",
        "Evidence: causal and content",
        "Two separate questions with three possible answers each: specific, nonspecific, untested. The direction \
         file carries both words and the numbers behind them, so that any reader can recompute them.",
    ),
    term(
        "causal",
        "Causal axis",
        "Specific when the direction has rank p below 0.05 in every one of the four control families, each of at \
         least 39 controls, while [[coherence|coherence]] stays within its [[margin|margin]]. Nonspecific when it \
         was measured and this fails. Untested when a part of the measurement is missing.",
    ),
    term(
        "content",
        "Content axis",
        "Specific when subtracting the direction lowers the insecure adapter's [[code-preference|code preference]] \
         more than the secure adapter's, paired over prompts, with p below 0.01. Otherwise nothing shows that the \
         direction is about the code being insecure rather than about answering with code. The word \
         \u{201c}misalignment\u{201d} is used of a direction only where this axis is specific.",
    ),
    term(
        "separation",
        "Separation",
        "Balanced accuracy of telling the insecure adapter's activations from the base's by their score along the \
         direction, cut at the midpoint of the two extraction means, on prompts never used for extraction. Nearly \
         every finetune separates from its base, so this is a check and never evidence.",
    ),
    term(
        "score",
        "Score",
        "How far an activation lies along the direction, counted from the base model's mean in standard deviations \
         of the base model's scores.",
    ),
    term(
        "auroc",
        "AUROC",
        "The chance that a random insecure activation scores above a random base activation: 0.5 is guessing, 1 is \
         complete separation.",
    ),
    term("cohens-d", "Cohen's d", "Difference of the two mean scores over their pooled standard deviation."),
    term(
        "top-dimension",
        "Top dimension",
        "The largest share of the mean squared activation norm that a single dimension holds. Where it is large, a \
         mean difference and its strength mostly measure that one dimension.",
    ),
    term(
        "splits",
        "Splits",
        "Three sets of prompts without overlap: extraction (the direction), calibration (thresholds and the choice \
         of the cell) and evaluation (every figure reported).",
    ),
    term(
        "threshold",
        "Threshold and alarm rate",
        "A sequence is flagged when its statistic passes the threshold. The stated rate is the share of calm \
         sequences allowed to be flagged; the upper bound is the 95 % Clopper\u{2013}Pearson limit of what the \
         calibration sample shows. About 3/n bounds the rate when none of n calm sequences raises an alarm, so a \
         sample cannot support any rate below that.",
    ),
    term(
        "horizon",
        "Horizon",
        "How many tokens, counted from the last prompt token, a statistic (last, mean or running maximum) looks at. \
         Each horizon has its own threshold.",
    ),
    term(
        "held-out",
        "Held-out alarms",
        "The alarm rate of the base model's own sequences on prompts that set no threshold. It is marked \u{201c}above\u{201d} where \
         chance gives so many alarms at the stated rate in fewer than one of twenty samples.",
    ),
    term(
        "detection",
        "Detection",
        "The share of the insecure adapter's sequences, on evaluation prompts, above a threshold of the running maximum.",
    ),
    term(
        "middle",
        "Middle-layer cell",
        "The same test at a layer in the middle, where later blocks still react to the edit and steering can do \
         more than exchange a token.",
    ),
    term(
        "digest",
        "Digest",
        "The SHA-256 of a file's bytes: two files with the same digest are the same file.",
    ),
];

/// Escapes `text` for HTML and turns `[[id|label]]` into a link to the entry `id`.
pub fn linked(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(start) = rest.find("[[") {
        let (before, tail) = rest.split_at(start);
        escape(before, &mut out);
        match tail[2..].split_once("]]").and_then(|(link, after)| link.split_once('|').map(|l| (l, after))) {
            Some(((id, label), after)) if TERMS.iter().any(|t| t.id == id) => {
                out.push_str(&format!("<a class=\"term\" href=\"#def-{id}\">"));
                escape(label, &mut out);
                out.push_str("</a>");
                rest = after;
            }
            _ => {
                out.push_str("[[");
                rest = &tail[2..];
            }
        }
    }
    escape(rest, &mut out);
    out
}

/// The text with its links as their labels.
pub fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, tail)) = rest.split_once("[[") {
        let Some((label, after)) =
            tail.split_once("]]").and_then(|(link, after)| Some((link.split_once('|')?.1, after)))
        else {
            break;
        };
        out.push_str(before);
        out.push_str(label);
        rest = after;
    }
    out + rest
}

/// Appends `text`, escaped for HTML text and attributes.
pub fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_known_terms_and_escapes_the_rest() {
        assert_eq!(
            linked("a < [[rank-p|rank p]] & [[nosuch|x]]"),
            "a &lt; <a class=\"term\" href=\"#def-rank-p\">rank p</a> &amp; [[nosuch|x]]"
        );
        assert_eq!(linked("[["), "[[");
        assert_eq!(plain("a [[rank-p|rank p]] and [[b|c]]"), "a rank p and c");
        assert_eq!(plain("[[x] ]] [["), "[[x] ]] [[");
    }

    #[test]
    fn identifiers_are_unique_and_inner_links_resolve() {
        for (i, t) in TERMS.iter().enumerate() {
            assert!(TERMS[..i].iter().all(|other| other.id != t.id), "{} twice", t.id);
            assert!(!linked(t.meaning).contains("[["), "dangling link in {}", t.id);
        }
    }
}
