use std::time::Duration;

use half::{bf16, f16};

/// Values that a collective reads: f32, bf16, f16 or i32.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// IEEE binary32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE binary16.
    F16(&'a [f16]),
    /// 32-bit integers.
    I32(&'a [i32]),
}

/// Values that a collective writes.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// IEEE binary32.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// IEEE binary16.
    F16(&'a mut [f16]),
    /// 32-bit integers.
    I32(&'a mut [i32]),
}

macro_rules! conversions {
    ($($variant:ident: $element:ty),*) => {$(
        impl<'a> From<&'a [$element]> for Values<'a> {
            fn from(values: &'a [$element]) -> Self {
                Values::$variant(values)
            }
        }
        impl<'a> From<&'a mut [$element]> for ValuesMut<'a> {
            fn from(values: &'a mut [$element]) -> Self {
                ValuesMut::$variant(values)
            }
        }
    )*};
}
conversions!(F32: f32, Bf16: bf16, F16: f16, I32: i32);

impl Values<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::Bf16(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::I32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of the element type.
    pub fn element(&self) -> &'static str {
        match self {
            Values::F32(_) => "f32",
            Values::Bf16(_) => "bf16",
            Values::F16(_) => "f16",
            Values::I32(_) => "i32",
        }
    }
}

impl ValuesMut<'_> {
    /// The same values, to read.
    pub fn as_values(&self) -> Values<'_> {
        match self {
            ValuesMut::F32(v) => Values::F32(v),
            ValuesMut::Bf16(v) => Values::Bf16(v),
            ValuesMut::F16(v) => Values::F16(v),
            ValuesMut::I32(v) => Values::I32(v),
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.as_values().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a collective operation can fail with. All but [`CollectiveError::Misuse`] end the group: every later call of every
/// rank fails, and only new processes can go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank died, panicked or left.
    #[error("rank {rank} failed: {message}")]
    RankFailed {
        /// The rank that is gone.
        rank: usize,
        /// What is known of its end.
        message: String,
    },
    /// Some ranks did not arrive before the deadline.
    #[error("{op}: rank {} did not arrive within {after:?}", list(missing))]
    Timeout {
        /// The operation.
        op: &'static str,
        /// The ranks that did not arrive, as the rank that gave up first saw it.
        missing: Vec<usize>,
        /// The deadline.
        after: Duration,
    },
    /// A rank ended the group with [`Collective::abort`].
    #[error("rank {rank} ended the group: {message}")]
    Aborted {
        /// Who did.
        rank: usize,
        /// Its reason.
        message: String,
    },
    /// Ranks called different operations, or with different lengths or elements.
    #[error("rank {rank} disagrees with the others: {message}")]
    Mismatch {
        /// A rank whose call differs from that of the rank that noticed.
        rank: usize,
        /// Both calls.
        message: String,
    },
    /// Arguments that contradict themselves; noticed before anything is sent. A bug of the caller.
    #[error("{op}: {detail}")]
    Misuse {
        /// The operation.
        op: &'static str,
        /// What is wrong with them.
        detail: String,
    },
    /// The library or the system under the group failed.
    #[error("{op}: {message}")]
    Transport {
        /// The operation or call.
        op: &'static str,
        /// The library's own message.
        message: String,
    },
}

fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Collective operations among the ranks of a tensor-parallel group, on host memory.
///
/// All ranks make the same calls in the same order. Sums are taken in rank order, so that all ranks hold the same bits, and
/// for any way the values travel; 16-bit elements are summed in f32 and rounded once, integers wrap.
pub trait Collective: Send + Sync {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn world_size(&self) -> usize;

    /// Replaces `values` by the element-wise sum over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn all_reduce(&self, values: ValuesMut<'_>) -> Result<(), CollectiveError>;

    /// The sum over all ranks of `input` (all shares, one after the other), of which this rank gets its share
    /// `counts[rank]` in `output`. `counts` has one entry a rank and may be uneven.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn reduce_scatter(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError>;

    /// All ranks' `input` (`counts[rank]` elements each, possibly uneven) one after the other in `output`.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn all_gather(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError>;

    /// Copies `values` of rank `root` to all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result<(), CollectiveError>;

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// Whether the group still stands, without waiting for anybody: what a watchdog asks between steps.
    ///
    /// # Errors
    /// What the next call would fail with.
    fn check(&self) -> Result<(), CollectiveError>;

    /// Ends the group: whoever waits in a call, on any rank, returns [`CollectiveError::Aborted`]. May be called from any
    /// thread, also while another is in a call. Without effect on a group that has ended.
    fn abort(&self, message: &str);
}

/// Checks the arguments of [`Collective::reduce_scatter`] (`whole` is the input) and [`Collective::all_gather`] (`whole` is
/// the output): one count a rank, `whole` as long as all counts, `share` as long as this rank's, one element type.
///
/// # Errors
/// [`CollectiveError::Misuse`].
pub fn check_shares(
    op: &'static str,
    group: (usize, usize),
    counts: &[usize],
    whole: Values<'_>,
    share: Values<'_>,
) -> Result<(), CollectiveError> {
    let (rank, world_size) = group;
    let misuse = |detail| Err(CollectiveError::Misuse { op, detail });
    if counts.len() != world_size {
        return misuse(format!("{} counts for {world_size} ranks", counts.len()));
    }
    if whole.element() != share.element() {
        return misuse(format!("{} and {} in one call", whole.element(), share.element()));
    }
    let total = counts.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
    if total != Some(whole.len()) {
        return misuse(format!("{} elements for counts {counts:?}", whole.len()));
    }
    if counts.get(rank) != Some(&share.len()) {
        return misuse(format!("rank {rank} has {} elements for counts {counts:?}", share.len()));
    }
    Ok(())
}

/// The group of one rank: every operation is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Single {
    fn copy(
        op: &'static str,
        from: Values<'_>,
        counts: &[usize],
        to: ValuesMut<'_>,
    ) -> Result<(), CollectiveError> {
        check_shares(op, (0, 1), counts, from, to.as_values())?;
        match (from, to) {
            (Values::F32(from), ValuesMut::F32(to)) => to.copy_from_slice(from),
            (Values::Bf16(from), ValuesMut::Bf16(to)) => to.copy_from_slice(from),
            (Values::F16(from), ValuesMut::F16(to)) => to.copy_from_slice(from),
            (Values::I32(from), ValuesMut::I32(to)) => to.copy_from_slice(from),
            (from, to) => {
                let detail = format!("{} and {} in one call", from.element(), to.as_values().element());
                return Err(CollectiveError::Misuse { op, detail });
            }
        }
        Ok(())
    }
}

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: ValuesMut<'_>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn reduce_scatter(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError> {
        Self::copy("reduce_scatter", input, counts, output)
    }

    fn all_gather(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError> {
        Self::copy("all_gather", input, counts, output)
    }

    fn broadcast(&self, root: usize, _: ValuesMut<'_>) -> Result<(), CollectiveError> {
        if root != 0 {
            let detail = format!("root {root} in a group of one");
            return Err(CollectiveError::Misuse { op: "broadcast", detail });
        }
        Ok(())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn check(&self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// Nobody waits in a group of one.
    fn abort(&self, _: &str) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_one_copies() {
        let mut values = [1.5f32, -2.0];
        Single.all_reduce((&mut values[..]).into()).unwrap();
        Single.broadcast(0, (&mut values[..]).into()).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        let mut gathered = [bf16::ZERO; 3];
        let input = [1.0, 2.0, 3.0].map(bf16::from_f32);
        Single.all_gather((&input[..]).into(), &[3], (&mut gathered[..]).into()).unwrap();
        assert_eq!(gathered, input);
        let mut share = [0i32; 2];
        Single.reduce_scatter((&[7, 8][..]).into(), &[2], (&mut share[..]).into()).unwrap();
        assert_eq!(share, [7, 8]);
    }

    #[test]
    fn arguments_that_contradict_themselves_are_refused() {
        let (input, mut output) = ([0f32; 3], [0f32; 3]);
        for (counts, words) in
            [(&[3usize, 0][..], "2 counts for 1 ranks"), (&[2], "counts [2]"), (&[usize::MAX], "counts")]
        {
            let error = Single.all_gather((&input[..]).into(), counts, (&mut output[..]).into()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        let error = Single.all_gather((&[0i32; 3][..]).into(), &[3], (&mut output[..]).into()).unwrap_err();
        assert_eq!(error.to_string(), "all_gather: i32 and f32 in one call");
        assert!(Single.broadcast(1, (&mut output[..]).into()).is_err());
    }
}
