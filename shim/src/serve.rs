//! Stands in for the service until it is there.
use crate::serve_args::ServeArgs;

/// Refuses to serve.
pub fn run(args: ServeArgs) -> Result<(), Box<dyn std::error::Error>> {
    let why = "this build has no task service";
    args.readiness.failed(why);
    Err(why.into())
}
