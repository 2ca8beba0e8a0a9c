//! A blocking gRPC client of one containerd: what [`crate::Api`] and [`crate::Cri`] have in common.

use std::future::Future;
use std::path::Path;

use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{self, Code};
use tokio::runtime::Runtime;

use crate::containerd::Containerd;
use crate::direct::ANSWERS_WITHIN;

/// What containerd answers instead of what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The status code.
    pub code: Code,
    /// The text.
    pub message: String,
}

/// A connection and the runtime that drives it. May be shared between threads.
pub(crate) struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// Connects; `containerd` runs.
    #[track_caller]
    pub(crate) fn of(containerd: &Containerd) -> Client {
        Client::at(&containerd.node().path(containerd.address()))
    }

    /// Connects to the containerd at this socket.
    #[track_caller]
    pub(crate) fn at(socket: &Path) -> Client {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap_or_else(|error| panic!("start a client's runtime: {error}"));
        let channel = runtime
            .block_on(containerd_client::connect(socket))
            .unwrap_or_else(|error| panic!("connect to {}: {error}", socket.display()));
        Client { runtime, channel }
    }

    /// One call to its end.
    pub(crate) fn call<Q, R, F>(
        &self,
        request: tonic::Request<Q>,
        call: impl FnOnce(Channel, tonic::Request<Q>) -> F,
    ) -> Result<R, Refused>
    where
        F: Future<Output = Result<tonic::Response<R>, tonic::Status>>,
    {
        let answer = async {
            tokio::time::timeout(ANSWERS_WITHIN, call(self.channel.clone(), request)).await
        };
        match self.runtime.block_on(answer) {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Refused {
                code: status.code(),
                message: status.message().to_owned(),
            }),
            Err(_) => panic!("containerd did not answer within {ANSWERS_WITHIN:?}"),
        }
    }
}
