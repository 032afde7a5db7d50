package hubble

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// eventLayer7 is the event type of flows above the transport. demarc makes none, but
// what asks for them is checked like everything else.
const eventLayer7 = 129

// layer7 adds the filters of DNS and HTTP.
func layer7(b *builder, f *flowpb.FlowFilter) {
	expressionsOf(b, "dns_query", f.GetDnsQuery(), func(f *flowpb.Flow) string { return f.GetL7().GetDns().GetQuery() })
	http := len(f.GetHttpStatusCode()) + len(f.GetHttpMethod()) + len(f.GetHttpPath()) + len(f.GetHttpUrl()) + len(f.GetHttpHeader())
	if http > 0 && len(f.GetEventType()) > 0 && !slices.ContainsFunc(f.GetEventType(), func(t *flowpb.EventTypeFilter) bool { return t.GetType() == eventLayer7 }) {
		b.fail("event_type", "filters of HTTP need events of type l7")
	}
	statusCodes(b, f.GetHttpStatusCode())
	if methods := f.GetHttpMethod(); bounded(b, "http_method", methods) {
		b.add(func(f *flowpb.Flow) bool {
			is := f.GetL7().GetHttp().GetMethod()
			return is != "" && slices.ContainsFunc(methods, func(m string) bool { return strings.EqualFold(m, is) })
		})
	}
	expressionsOf(b, "http_url", f.GetHttpUrl(), func(f *flowpb.Flow) string { return f.GetL7().GetHttp().GetUrl() })
	expressionsOf(b, "http_path", f.GetHttpPath(), func(f *flowpb.Flow) string {
		u, err := url.ParseRequestURI(f.GetL7().GetHttp().GetUrl())
		if err != nil {
			return ""
		}
		return u.Path
	})
	if headers := f.GetHttpHeader(); bounded(b, "http_header", headers) {
		b.add(func(f *flowpb.Flow) bool {
			return slices.ContainsFunc(f.GetL7().GetHttp().GetHeaders(), func(is *flowpb.HTTPHeader) bool {
				return slices.ContainsFunc(headers, func(h *flowpb.HTTPHeader) bool {
					return h.GetKey() == is.GetKey() && h.GetValue() == is.GetValue()
				})
			})
		})
	}
}

// expressionsOf matches texts by regular expressions (RE2: linear in the text).
func expressionsOf(b *builder, field string, values []string, of func(*flowpb.Flow) string) {
	if !bounded(b, field, values) {
		return
	}
	var all []*regexp.Regexp
	for _, v := range values {
		e, err := regexp.Compile(v)
		if err != nil {
			b.fail(field, "%v", err)
			return
		}
		all = append(all, e)
	}
	b.add(func(f *flowpb.Flow) bool {
		text := of(f)
		return text != "" && slices.ContainsFunc(all, func(e *regexp.Regexp) bool { return e.MatchString(text) })
	})
}

var statusPattern = regexp.MustCompile(`^(?:[1-5][0-9]{2}|[1-5][0-9]?\+)$`)

// statusCodes takes codes, and prefixes of them with a plus: 404, 4+.
func statusCodes(b *builder, values []string) {
	if !bounded(b, "http_status_code", values) {
		return
	}
	for _, v := range values {
		if !statusPattern.MatchString(v) {
			b.fail("http_status_code", "%q is no code and no prefix like 4+", v)
			return
		}
	}
	b.add(func(f *flowpb.Flow) bool {
		code := f.GetL7().GetHttp().GetCode()
		text := fmt.Sprintf("%03d", code)
		return code != 0 && slices.ContainsFunc(values, func(v string) bool { return strings.HasPrefix(text, strings.TrimSuffix(v, "+")) })
	})
}
