{{- define "hessquik.selector" -}}
app.kubernetes.io/name: hessquik
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Helm reads numbers as floats, and would print 33554432 as 3.3554432e+07. */}}
{{- define "hessquik.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end -}}
{{- end -}}

{{- define "hessquik.metadata" -}}
name: {{ .Release.Name | quote }}
labels:
  {{- include "hessquik.selector" . | nindent 2 }}
{{- end -}}
