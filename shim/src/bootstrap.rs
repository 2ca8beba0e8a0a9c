//! What containerd writes to the standard input of `start`: nothing, the options (1.6 to 2.2), or
//! `BootstrapParams` (2.3 on). Pure.
//!
//! Nothing says which of the two it is, and each decodes as the other: `Any{1: type, 2: bytes}`,
//! `BootstrapParams{1: id, 2: namespace}`. What decides is that the second repeats what the
//! command line says. Whatever cannot be understood is ignored, because everything in it that
//! matters to the task comes again with Create, where it can be refused in words; failing here
//! would make a newer containerd unable to start anything.

use std::path::PathBuf;

use prost::Message;
use prost_types::Any;
use recoverd_common::pb::{bootstrap::BootstrapParams, type_url};

use crate::{args::Flags, options::bare};

/// What `start` needs of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Input {
    /// The folder for sockets, when this containerd has one of its own (2.3 on).
    pub socket_dir: Option<PathBuf>,
    /// containerd's addresses, for the day when it no longer says them on the command line and in
    /// the environment too.
    pub grpc_address: Option<String>,
    /// As above.
    pub ttrpc_address: Option<String>,
    /// The runtime's options, not decoded yet.
    pub options: Option<Any>,
}

/// Reads `bytes`; never fails.
pub fn parse(bytes: &[u8], flags: &Flags) -> Input {
    if bytes.is_empty() {
        return Input::default();
    }
    if let Ok(params) = BootstrapParams::decode(bytes)
        && params.instance_id == flags.id.as_str()
        && params.namespace == flags.namespace.as_str()
    {
        let socket_dir = params
            .socket_dir
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute());
        let options = params
            .extensions
            .into_iter()
            .filter_map(|extension| extension.value)
            .find(are_options);
        return Input {
            socket_dir,
            grpc_address: path_of(params.containerd_grpc_address),
            ttrpc_address: path_of(params.containerd_ttrpc_address),
            options,
        };
    }
    let options = Any::decode(bytes).ok().filter(are_options);
    Input {
        options,
        ..Input::default()
    }
}

/// The flags and variables that these repeat have no scheme.
fn path_of(address: String) -> Option<String> {
    let path = address.strip_prefix("unix://").unwrap_or(&address);
    (!path.is_empty()).then(|| path.to_owned())
}

fn are_options(any: &Any) -> bool {
    matches!(
        bare(&any.type_url),
        type_url::RUNC_OPTIONS | type_url::RUNTIME_OPTIONS
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Invocation, parse as parse_args};
    use proptest::prelude::*;
    use recoverd_common::pb::bootstrap::Extension;

    fn flags() -> Flags {
        let words = ["-namespace", "default", "-id", "c1", "start"];
        match parse_args(words.map(Into::into)) {
            Ok(Invocation::Start(flags)) => flags,
            other => panic!("{other:?}"),
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_version: "v2.4.0".into(),
            containerd_grpc_address: "unix:///run/c.sock".into(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".into(),
            extensions: vec![
                Extension { value: None },
                Extension {
                    value: Some(Any {
                        type_url: "x.Cri".into(),
                        value: vec![1],
                    }),
                },
                Extension {
                    value: Some(options()),
                },
            ],
            socket_dir: Some("/run/other/s".into()),
            ..Default::default()
        }
    }

    fn options() -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: vec![0x32, 4, b'r', b'u', b'n', b'c'],
        }
    }

    #[test]
    fn the_options_of_older_daemons_are_found_as_recorded() {
        // Recorded from containerd 1.6.20.
        let mut recorded = vec![0x0a, 0x1a];
        recorded.extend(b"containerd.runc.v1.Options");
        recorded.extend([0x12, 6, 0x32, 4]);
        recorded.extend(b"runc");
        assert_eq!(recorded, options().encode_to_vec());
        assert_eq!(
            parse(&recorded, &flags()),
            Input {
                options: Some(options()),
                ..Input::default()
            }
        );
    }

    #[test]
    fn bootstrap_params_are_known_by_what_they_repeat() {
        assert_eq!(
            parse(&params().encode_to_vec(), &flags()),
            Input {
                socket_dir: Some("/run/other/s".into()),
                grpc_address: Some("/run/c.sock".into()),
                ttrpc_address: Some("/run/c.sock.ttrpc".into()),
                options: Some(options())
            }
        );
        // Of another task: not ours to believe.
        let other = BootstrapParams {
            instance_id: "c2".into(),
            ..params()
        };
        assert_eq!(parse(&other.encode_to_vec(), &flags()), Input::default());
        // A relative folder would depend on where we stand.
        let relative = BootstrapParams {
            socket_dir: Some("s".into()),
            ..params()
        };
        assert_eq!(parse(&relative.encode_to_vec(), &flags()).socket_dir, None);
    }

    #[test]
    fn what_cannot_be_understood_is_ignored() {
        let unknown = Any {
            type_url: "windows.Options".into(),
            value: vec![1, 2],
        };
        for bytes in [
            vec![],
            vec![0xff; 40],
            b"{\"json\":1}".to_vec(),
            unknown.encode_to_vec(),
        ] {
            assert_eq!(parse(&bytes, &flags()), Input::default());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes, &flags());
        }
    }
}
