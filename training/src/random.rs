//! Random numbers addressed by name, so that arms of an experiment share them (common random numbers)
//! and a resumed run draws what the interrupted one would have.

/// SplitMix64's output function (Steele et al. 2014): a bijection on 64 bits that passes for random.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 64 bits that depend on every number of `address`, in order.
pub fn bits(address: &[u64]) -> u64 {
    address.iter().fold(0, |h, &a| mix(h ^ mix(a.wrapping_add(0x9e37_79b9_7f4a_7c15))))
}

/// A number in [0, 1) with 53 random bits.
pub fn uniform(address: &[u64]) -> f64 {
    (bits(address) >> 11) as f64 / (1u64 << 53) as f64
}

/// The number in [0, 1) at place `i` of the SplitMix64 stream with state `seed`: one mix each, for long rows.
pub fn uniform_at(seed: u64, i: u64) -> f64 {
    let state = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

/// A permutation of `0..n` (Fisher-Yates).
pub fn permutation(n: usize, address: &[u64]) -> Vec<usize> {
    let seed = bits(address);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = (bits(&[seed, i as u64]) % (i as u64 + 1)) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_independent_and_repeatable() {
        assert_eq!(bits(&[1, 2]), bits(&[1, 2]));
        assert_ne!(bits(&[1, 2]), bits(&[2, 1]));
        let mean = (0..10_000).map(|i| uniform(&[3, i])).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 4.0 / (12f64 * 10_000.0).sqrt(), "{mean}");
        let mean = (0..10_000).map(|i| uniform_at(3, i)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 4.0 / (12f64 * 10_000.0).sqrt(), "{mean}");
        let mut p = permutation(100, &[7]);
        assert_ne!(p, (0..100).collect::<Vec<_>>());
        p.sort();
        assert_eq!(p, (0..100).collect::<Vec<_>>());
    }
}
