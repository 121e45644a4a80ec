// Writes a quantised model in float32, with llama.cpp's own quantiser: dequantize MODEL.gguf OUT.gguf
#include "host.hpp"

int main(int argc, char **argv) {
  const host::Arguments arguments(argc, argv, 2, "usage: dequantize MODEL.gguf OUT.gguf");
  host::quiet();
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = LLAMA_FTYPE_ALL_F32;
  params.allow_requantize = true;
  params.nthread = 1;
  if (llama_model_quantize(arguments.words[0].c_str(), arguments.words[1].c_str(), &params) != 0) {
    host::fail("llama.cpp does not write it");
  }
  return 0;
}
