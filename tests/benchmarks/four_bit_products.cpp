// Seconds of oneDNN's products with weights of 4 bits, which it unpacks itself, and with bfloat16's; `products.py` compiles and runs it.
//
// Arguments: ROWS INPUTS OUTPUTS KIND, where KIND is bf16, forward or backward. W [outputs, inputs] has a scale for each 32 inputs of a
// row, as packed stores have it. It prints GFLOP/s and oneDNN's name of what it ran.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

using namespace dnnl;

int main(int count, char **words) {
    if (count != 5) return 2;
    long rows = atol(words[1]);
    const long inputs = atol(words[2]), outputs = atol(words[3]);
    const std::string kind = words[4];
    const bool packed = kind != "bf16", back = kind == "backward";
    const long inner = back ? outputs : inputs, made = back ? inputs : outputs;
    const long along = back ? 1 : 32, across = back ? 32 : 1; // weights that share a scale, by inner and made elements
    const auto wide = memory::data_type::bf16;
    engine cpu(engine::kind::cpu, 0);
    stream queue(cpu);
    memory::desc right({inner, made}, packed ? memory::data_type::u4 : wide, back ? memory::format_tag::ab : memory::format_tag::ba);
    primitive_attr told;
    if (packed) {
        told.set_fpmath_mode(fpmath_mode::bf16, true);
        told.set_scales(DNNL_ARG_WEIGHTS, 3, {along, across}, memory::data_type::f32);
    }
    const auto tag = memory::format_tag::ab;
    memory::desc left({rows, inner}, wide, tag), out({rows, made}, wide, tag);
    matmul::primitive_desc described(cpu, left, right, out, told);
    if (std::string(described.impl_info_str()).rfind("ref", 0) == 0) { // the reference implementation takes half a second for a row
        rows = 1;
        left = memory::desc({rows, inner}, wide, tag), out = memory::desc({rows, made}, wide, tag);
        described = matmul::primitive_desc(cpu, left, right, out, told);
    }
    matmul product(described);
    memory::desc factors({inner / along, made / across}, memory::data_type::f32, memory::format_tag::ab);
    memory x(left, cpu), weight(right, cpu), y(out, cpu), scales(factors, cpu);
    for (const memory &each : {x, weight, y, scales}) std::memset(each.get_data_handle(), 0x3c, each.get_desc().get_size());
    std::unordered_map<int, memory> given = {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_DST, y}};
    if (packed) given.insert({DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS, scales});
    std::vector<double> seconds;
    for (int turn = 0; turn < 9; turn++) {
        const auto begun = std::chrono::steady_clock::now();
        product.execute(queue, given);
        queue.wait();
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    }
    std::sort(seconds.begin(), seconds.end());
    printf("%.3f %s\n", 2e-9 * rows * inner * made / seconds[seconds.size() / 2], described.impl_info_str());
}
