{{- /* The kubelet asks the pod's address, which is the node's, unless it is told another. */ -}}
{{- define "demarc.probeHost" -}}
{{- if not (has .Values.metrics.host (list "" "0.0.0.0" "::" "[::]")) }}host: {{ .Values.metrics.host }}, {{ end -}}
{{- end -}}
