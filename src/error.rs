//! The one error type: what was attempted, and what stood in the way.

use std::fmt;

/// What the process should answer for an error: which side is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The configuration asks for something that cannot be: the user's to mend.
    Config,
    /// The host refused: a file, a permission, a resource, KVM itself.
    Host,
    /// The guest did something that ended it.
    Guest,
}

/// An error with the chain of attempts that led to it; `Display` prints the whole chain.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind; `message` says what is wrong and what to do.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: None }))
    }
    /// A fault of the configuration.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }
    /// A fault of the host.
    pub fn host(message: impl Into<String>) -> Self {
        Self::new(Kind::Host, message)
    }
    /// A fault of the guest.
    pub fn guest(message: impl Into<String>) -> Self {
        Self::new(Kind::Guest, message)
    }
    /// Which side is at fault.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }
    /// The outermost message alone, without its causes.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut source = std::error::Error::source(self);
        // Our own `Display` prints the rest of the chain already.
        if let Some(cause) = source.take() {
            write!(f, ": {cause}")?;
            if !cause.is::<Error>() {
                let mut next = cause.source();
                while let Some(cause) = next {
                    write!(f, ": {cause}")?;
                    next = cause.source();
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Adds what was attempted to any error on its way up.
pub trait Context<T> {
    /// Wraps the error: `message` says what was attempted ("open disk `a.img`"). The kind of one of
    /// our own errors is kept; anybody else's error is the host's.
    fn context(self, message: impl Into<String>) -> Result<T>;
    /// The same, with a message that is costly to make.
    fn with_context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl Into<String>) -> Result<T> {
        self.with_context(|| message)
    }
    fn with_context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| {
            let kind =
                (&source as &dyn std::any::Any).downcast_ref::<Error>().map_or(Kind::Host, Error::kind);
            Error(Box::new(Inner { kind, message: message().into(), source: Some(Box::new(source)) }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_the_whole_chain_once() {
        let cause: Result<()> = Err(Error::config("it is empty"));
        let error = cause.context("read kernel `k`").context("start").unwrap_err();
        assert_eq!(error.to_string(), "start: read kernel `k`: it is empty");
        assert_eq!(error.kind(), Kind::Config);
        assert_eq!(error.message(), "start");
    }

    #[test]
    fn a_foreign_error_is_the_hosts() {
        let error = std::fs::File::open("/nonexistent").context("open disk `x`").unwrap_err();
        assert_eq!(error.kind(), Kind::Host);
        assert_eq!(error.to_string(), "open disk `x`: No such file or directory (os error 2)");
    }
}
