"""The language model as one ONNX graph for prefill and decode, in two attention forms.

``gqa`` is for ONNX Runtime (opset 21 and com.microsoft), ``scatter`` is plain ONNX (opset 24) for
TensorRT and as its parity copy. Embedding lookup, image splicing and rotary angles are the host's
work (``medmo_edge.vision_inputs``); nothing here samples or runs a graph.

Inputs of ``gqa``, in this order. B batch, S tokens of this call, P tokens already cached, C cache
capacity (any, fixed by the buffers), D hidden_size, K key/value heads, d head_dim, T graph dtype:

    inputs_embeds                T      [B, S, D]     image features already spliced in
    rope_cos, rope_sin           T      [B, S, d/2]   vision_inputs.rope_cos_sin
    seqlens_k                    int32  [B]           P + S - 1 of each sequence
    total_sequence_length        int32  []            largest P + S of the batch
    last_index                   int64  [B, 1]        row of this call whose logits are wanted
    deepstack_0 ..               T      [B, S, D]     one per deepstack level, zero off the images
    past_key_values.i.key/.value T      [B, K, C, d]  i = 0 .. layers - 1, key then value

Outputs: logits float32 [B, 1, V]; present.i.key/.value like past_key_values.i.*, which may be the
same buffers. ONNX Runtime on CPU refuses B > 1 when S > 1 and P > 0.

Inputs of ``scatter``: inputs_embeds, rope_cos, rope_sin, write_indices int64 [B] (cache slot of the
first token), last_index, deepstack_0 .., past_k_0, past_v_0, past_k_1 ..; outputs: logits,
present_k_0, present_v_0, ... C is static.
"""
