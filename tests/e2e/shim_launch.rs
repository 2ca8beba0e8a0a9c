//! x
recoverd_tests::tests! {}
