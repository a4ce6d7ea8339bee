//! Query heads: dealt whole, inside as few KV groups as possible.
//!
//! What a rank holds of the KV cache, and what it reads of it at every decoded token, are its KV heads, so those come first:
//! no rank gets query heads of more KV groups than `ceil(kv_heads / ranks)`, the least there can be. Among the ways that
//! leaves, the largest share of query heads is the least there can be. So 28 heads in 4 groups are 10, 9, 9 over 3 ranks (two
//! groups each), 4, 4, 4, 4, 3, 3, 3, 3 over 8 (one group each), but 7, 7, 7, 4, 3 over 5: even shares of 6 would double the
//! cache of every rank.
//!
//! A share is a run of consecutive heads. A share of several groups may begin and end inside one
//! (`longhaul_backend::HeadGroups::Cut`).

use std::cmp::Reverse;
use std::ops::Range;

/// The query heads of every rank, the larger shares first.
pub(super) fn deal(query_heads: usize, kv_heads: usize, ranks: usize) -> Vec<Range<usize>> {
    let mut shares = if ranks >= kv_heads {
        inside_groups(query_heads / kv_heads, kv_heads, ranks)
    } else {
        across_groups(query_heads, kv_heads, ranks)
    };
    shares.sort_by_key(|share| Reverse(share.len()));
    shares
}

/// Every rank inside one group; the groups have equally many ranks, give or take one.
fn inside_groups(group: usize, kv_heads: usize, ranks: usize) -> Vec<Range<usize>> {
    (0..kv_heads)
        .flat_map(|kv_head| {
            let first = kv_head * group;
            let members = ranks / kv_heads + usize::from(kv_head < ranks % kv_heads);
            evenly(group, members).map(move |share| first + share.start..first + share.end)
        })
        .collect()
}

/// `0..total` in `parts` runs, the longer ones first.
fn evenly(total: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let start = move |part: usize| part * (total / parts) + part.min(total % parts);
    (0..parts).map(move |part| start(part)..start(part + 1))
}

/// Fewer ranks than groups.
fn across_groups(query_heads: usize, kv_heads: usize, ranks: usize) -> Vec<Range<usize>> {
    let group = query_heads / kv_heads;
    let most_groups = kv_heads.div_ceil(ranks);
    let mut cut = Cut { query_heads, group, most_groups, most_heads: most_groups * group };
    // The least `most_heads` that still deals all heads out; whole groups always do.
    cut.most_heads = least(query_heads.div_ceil(ranks)..cut.most_heads, |most_heads| {
        Cut { most_heads, ..cut }.reaches_end(0, ranks)
    });
    if cut.most_heads == most_groups * group {
        return evenly(kv_heads, ranks).map(|groups| groups.start * group..groups.end * group).collect();
    }
    let mut start = 0;
    (0..ranks)
        .map(|rank| {
            let left = ranks - rank;
            let even = start + (query_heads - start).div_ceil(left);
            let furthest = cut.furthest(start);
            let end = least(even.min(furthest)..furthest, |end| cut.reaches_end(end, left - 1));
            let share = start..end;
            start = end;
            share
        })
        .collect()
}

/// The least of `range` for which `fits` holds, its end if there is none; what fits, fits from there on.
fn least(range: Range<usize>, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low.midpoint(high);
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The limits of a share.
#[derive(Clone, Copy)]
struct Cut {
    query_heads: usize,
    group: usize,
    most_groups: usize,
    most_heads: usize,
}

impl Cut {
    /// Where a share that begins at `start` ends at the latest.
    fn furthest(&self, start: usize) -> usize {
        let groups_end = (start / self.group + self.most_groups) * self.group;
        (start + self.most_heads).min(groups_end).min(self.query_heads)
    }

    /// Whether `ranks` shares can hold everything from `start` on. Taking the most at every step reaches furthest, since a
    /// later start never ends earlier.
    fn reaches_end(&self, start: usize, ranks: usize) -> bool {
        (0..ranks).fold(start, |at, _| self.furthest(at)) == self.query_heads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(query_heads: usize, kv_heads: usize, ranks: usize) -> Vec<usize> {
        deal(query_heads, kv_heads, ranks).iter().map(ExactSizeIterator::len).collect()
    }

    #[test]
    fn known_shares() {
        assert_eq!(lengths(28, 4, 8), [4, 4, 4, 4, 3, 3, 3, 3]);
        assert_eq!(lengths(14, 2, 4), [4, 4, 3, 3]);
        assert_eq!(lengths(7, 1, 3), [3, 2, 2]);
        assert_eq!(lengths(28, 4, 3), [10, 9, 9]);
        assert_eq!(lengths(28, 4, 5), [7, 7, 7, 4, 3]);
        assert_eq!(lengths(64, 8, 3), [24, 24, 16]);
        assert_eq!(lengths(64, 8, 7), [10, 9, 9, 9, 9, 9, 9]);
        assert_eq!(lengths(64, 8, 16), [4; 16]);
        assert_eq!(lengths(2, 1, 5), [1, 1, 0, 0, 0]);
    }

    /// The least largest share among all ways to cut the heads into runs of at most `most_groups` groups, by trying all.
    fn least_largest(query_heads: usize, group: usize, most_groups: usize, ranks: usize) -> usize {
        // best[start] = least largest share when heads `start..` go to the ranks counted so far.
        let mut best = vec![usize::MAX; query_heads + 1];
        best[query_heads] = 0;
        for _ in 0..ranks {
            best = (0..=query_heads)
                .map(|start| {
                    (start..=query_heads)
                        .filter(|&end| end == start || (end - 1) / group - start / group < most_groups)
                        .map(|end| best[end].max(end - start))
                        .min()
                        .unwrap()
                })
                .collect();
        }
        best[0]
    }

    #[test]
    fn shares_are_the_least_there_can_be() {
        for kv_heads in 1..=9 {
            for group in 1..=9 {
                for ranks in 1..=20 {
                    let (query_heads, case) = (kv_heads * group, format!("{kv_heads}·{group} over {ranks}"));
                    let shares = deal(query_heads, kv_heads, ranks);
                    let mut sorted = shares.clone();
                    sorted.retain(|s| !s.is_empty());
                    sorted.sort_by_key(|s| s.start);
                    let end = sorted.iter().fold(0, |at, share| {
                        assert_eq!(share.start, at, "{case}");
                        share.end
                    });
                    assert_eq!((end, shares.len()), (query_heads, ranks), "{case}");
                    let groups = |s: &Range<usize>| s.end.div_ceil(group) - s.start / group;
                    let most_groups = kv_heads.div_ceil(ranks);
                    assert_eq!(sorted.iter().map(groups).max(), Some(most_groups), "{case}");
                    let largest = shares.iter().map(ExactSizeIterator::len).max().unwrap();
                    assert_eq!(largest, least_largest(query_heads, group, most_groups, ranks), "{case}");
                    assert!(shares.is_sorted_by_key(|s| Reverse(s.len())), "{case}");
                }
            }
        }
    }
}
