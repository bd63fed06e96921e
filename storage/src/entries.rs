//! Turns what may fail on the way into what cannot, for consumers of plain entries.

/// Values of an iterator of results. It ends at the first error; [`UntilError::outcome`] then says so:
/// ask it before anything that was made of the values is used.
#[derive(Debug)]
pub struct UntilError<I, E> {
    inner: I,
    error: Option<E>,
}

impl<I, E> UntilError<I, E> {
    /// Over `inner`.
    pub fn new(inner: I) -> Self {
        Self { inner, error: None }
    }

    /// The error that ended it, if one did.
    pub fn outcome(self) -> Result<(), E> {
        self.error.map_or(Ok(()), Err)
    }
}

impl<T, E, I: Iterator<Item = Result<T, E>>> Iterator for UntilError<I, E> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.error.is_some() {
            return None;
        }
        match self.inner.next()? {
            Ok(value) => Some(value),
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn it_ends_at_the_first_error_and_says_so() {
        let mut some = UntilError::new([Ok(1), Err("x"), Ok(2)].into_iter());
        assert_eq!(some.by_ref().collect::<Vec<_>>(), [1]);
        assert_eq!(some.next(), None);
        assert_eq!(some.outcome(), Err("x"));
        let mut all = UntilError::new([Ok::<_, &str>(1), Ok(2)].into_iter());
        assert_eq!(all.by_ref().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(all.outcome(), Ok(()));
    }
}
