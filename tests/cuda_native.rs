//! Felid's own matrix product, as on machines without cuBLASLt. A process of its own: who multiplies is set for all of it.
#![cfg(feature = "cuda")]

#[path = "common/agree.rs"]
mod agree;
#[path = "common/devices.rs"]
mod devices;

use agree::{agrees_summing, one};
use felid::cuda::{Gemm, set_gemm};
use felid::ops;

#[test]
fn native_products_agree() {
    set_gemm(Gemm::Native);
    let linear = |v: &[felid::autograd::Var]| one(ops::linear(&v[0], &v[1], None));
    agrees_summing(517, "native linear", &[&[300, 517], &[260, 517]], linear);
    agrees_summing(512, "native linear aligned", &[&[2, 256, 512], &[384, 512]], linear);
    agrees_summing(1000, "native linear of one row", &[&[1, 1000], &[600, 1000]], linear);
    agrees_summing(5000, "native linear, long sums", &[&[5000, 24], &[40, 24]], linear);
    agrees_summing(2056, "native linear of many tiles", &[&[1030, 520], &[2056, 520]], linear);
    agrees_summing(129, "native linear with bias", &[&[129, 100], &[65, 100], &[65]], |v| {
        one(ops::linear(&v[0], &v[1], Some(&v[2])))
    });
    agrees_summing(130, "native matmul batched", &[&[3, 4, 65, 33], &[3, 4, 33, 130]], |v| one(ops::matmul(&v[0], &v[1])));
    agrees_summing(350, "native matmul broadcast", &[&[5, 65, 34], &[34, 70]], |v| one(ops::matmul(&v[0], &v[1])));
    agrees_summing(66, "native matmul of views", &[&[7, 65, 32], &[7, 66, 32]], |v| {
        one(ops::matmul(&v[0], &ops::transpose(&v[1], 1, 2)?))
    });
}
