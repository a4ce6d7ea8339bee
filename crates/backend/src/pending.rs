use crate::Result;

/// A sum over the ranks that has been started ([`crate::Backend::start_all_reduce`]).
pub struct Pending<T>(State<T>);

enum State<T> {
    Ready(T),
    Started(Box<dyn FnOnce() -> Result<T>>),
}

impl<T> Pending<T> {
    /// One that is there already.
    pub fn ready(sum: T) -> Self {
        Self(State::Ready(sum))
    }

    /// One that `wait` waits for.
    pub fn started(wait: impl FnOnce() -> Result<T> + 'static) -> Self {
        Self(State::Started(Box::new(wait)))
    }

    /// Waits for the sum.
    ///
    /// # Errors
    /// A rank that failed.
    pub fn finish(self) -> Result<T> {
        match self.0 {
            State::Ready(sum) => Ok(sum),
            State::Started(wait) => wait(),
        }
    }
}
