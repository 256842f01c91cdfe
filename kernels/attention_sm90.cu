#include "attention_sm90.cuh"
