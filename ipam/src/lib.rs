//! Address allocation for the pods of one node.
