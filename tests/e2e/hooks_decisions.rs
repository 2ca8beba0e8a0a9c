//! What the hooks do not do, and what they say.

recoverd_tests::tests! {
    on_every_release: [],
}
